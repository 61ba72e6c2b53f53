"""The latent reward on a random SD3: what it looks at, its files, its training, and runs that follow it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowalign.checks import ConfigError
from flowalign.compatibility import check_groups
from flowalign.models.sd3 import SD3
from flowalign.rewards.base import RewardError
from flowalign.rewards.latent import Latent
from flowalign.rewards.latent.data import Media, merge
from flowalign.rewards.latent.head import Head
from flowalign.rewards.latent.losses import accuracy, pairs, pointwise, preference, targets

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from flowalign.types import Conditioning

PROMPTS = ["two red circles", "a blue square"]
SIGMAS = torch.tensor([0.9, 0.2])


@pytest.fixture
def sd3(sd3_folder: Path) -> SD3:
    """Of weights that a test may change."""
    return SD3(str(sd3_folder), max_sequence_length=4)


@pytest.fixture
def bound(sd3: SD3, sd3_reward: Path) -> Latent:
    reward = Latent(str(sd3_reward), sigmas=[0.1, 0.4])
    reward.bind(sd3)
    return reward


def latents(model: SD3) -> Tensor:
    return torch.randn(2, *model.latent_shape(32, 48), generator=torch.Generator().manual_seed(1))


def scored(reward: Latent, x: Tensor, cond: Conditioning) -> list[float]:
    return reward.of_latents(x, cond, PROMPTS, [{}, {}]).tolist()


# ------------------------------------------------------------ the head


def test_one_token_is_attended_to_and_added_to_the_query():
    torch.manual_seed(0)
    head, token = Head(8, heads=2, hidden=(5, 3)), torch.randn(1, 1, 8)
    value = torch.nn.functional.linear(token, head.attention.in_proj_weight[16:], head.attention.in_proj_bias[16:])
    pooled = head.query + head.attention.out_proj(value)[0]
    first, _, second, _, third = head.mlp
    expected = third(second(first(pooled).relu()).relu())[:, 0]
    assert torch.allclose(head(token), expected, atol=1e-6)


def test_a_batch_is_its_rows_alone_and_tokens_have_no_order():
    torch.manual_seed(0)
    head, tokens = Head(8, heads=2), torch.randn(3, 5, 8)
    alone = torch.cat([head(row[None]) for row in tokens])
    assert torch.allclose(head(tokens), alone, atol=1e-6)
    assert torch.allclose(head(tokens.flip(1)), alone, atol=1e-6)
    assert alone.std() > 1e-3
    with pytest.raises(ValueError, match="8 heads do not divide tokens of width 12; 6 do"):
        Head(12)


# ------------------------------------------------------------ what it looks at


def test_it_sees_latents_noise_levels_and_text_but_neither_later_blocks_nor_what_becomes_of_the_policy(
    sd3: SD3, bound: Latent
):
    x, cond = latents(sd3), sd3.encode(PROMPTS)
    before = scored(bound, x, cond)
    with torch.no_grad():
        for parameter in sd3.pipe.transformer.parameters():
            parameter += 1.0  # as training might
    assert scored(bound, x, cond) == before
    swapped = scored(bound, x, cond.index(torch.tensor([1, 0])))
    assert max(abs(a - b) for a, b in zip(before, swapped, strict=True)) > 1e-6
    with torch.no_grad():
        one, other = (bound.of_noisy(x, torch.full((2,), sigma), cond) for sigma in (0.2, 0.8))
    assert (one - other).abs().min() > 1e-6


def test_the_later_blocks_are_not_part_of_it(sd3: SD3, sd3_reward: Path, bound: Latent):
    x, cond = latents(sd3), sd3.encode(PROMPTS)
    with torch.no_grad():
        for parameter in sd3.pipe.transformer.transformer_blocks[1:].parameters():
            parameter.mul_(0)
    other = Latent(str(sd3_reward), sigmas=[0.1, 0.4])
    other.bind(sd3)
    assert scored(other, x, cond) == scored(bound, x, cond)
    held = sum(p.numel() for p in other.network.trunk.parameters())
    assert held < sum(p.numel() for p in sd3.pipe.transformer.parameters())


def test_noisy_latents_have_a_gradient_and_mixed_levels_are_rows_alone(sd3: SD3, bound: Latent):
    x, cond = latents(sd3).requires_grad_(), sd3.encode(PROMPTS)
    together = bound.of_noisy(x, SIGMAS, cond)
    together.sum().backward()
    assert x.grad is not None
    assert (x.grad.flatten(1).abs().max(dim=1).values > 0).all()
    for i in range(2):
        row = slice(i, i + 1)
        assert torch.allclose(bound.of_noisy(x[row], SIGMAS[row], cond.index(row)), together[row], atol=1e-6)


def test_what_is_not_finite_has_no_score_and_spoils_no_other(sd3: SD3, bound: Latent):
    x, cond = latents(sd3), sd3.encode(PROMPTS)
    whole = scored(bound, x, cond)
    x[0, 0, 0, 0] = torch.inf
    found = bound.of_latents(x, cond, PROMPTS, [{}, {}])
    assert found.isnan().tolist() == [True, False]
    assert float(found[1]) == pytest.approx(whole[1], abs=1e-6)


# ------------------------------------------------------------ files


def test_a_reward_without_its_model_or_with_a_wrong_one_says_so(sd3: SD3, sd3_reward: Path):
    with pytest.raises(RewardError, match=r"call bind\(model\) first"):
        _ = Latent(str(sd3_reward)).network
    with pytest.raises(RewardError, match="there is no latent reward nowhere.*python -m flowalign.rewards.latent"):
        Latent("nowhere")
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        Latent(str(sd3_reward), sigmas=[])
    with torch.no_grad():
        sd3.pipe.transformer.pos_embed.proj.weight.add_(0.1)
    with pytest.raises(RewardError, match="has other weights: train one"):
        Latent(str(sd3_reward)).bind(sd3)


def test_precision_does_not_make_another_base(sd3_folder: Path, sd3_reward: Path):
    reward = Latent(str(sd3_reward))
    reward.bind(SD3(str(sd3_folder), max_sequence_length=4, train_dtype="bfloat16"))
    assert {p.dtype for p in reward.network.trunk.parameters()} == {torch.bfloat16}


def test_damaged_files_are_refused(sd3: SD3, sd3_reward: Path, tmp_path: Path):
    tensors, facts = load_file(sd3_reward / "reward.safetensors"), (sd3_reward / "reward.json").read_text()

    def refused(tensors: dict[str, Tensor], facts: str) -> str:
        save_file(tensors, tmp_path / "reward.safetensors")
        (tmp_path / "reward.json").write_text(facts)
        with pytest.raises(RewardError) as refusal:
            Latent(str(tmp_path)).bind(sd3)
        return str(refusal.value)

    assert "is damaged" in refused(tensors, facts[:20])
    assert "is damaged" in refused({k: v for k, v in tensors.items() if k != "head.query"}, facts)
    assert "another size" in refused(tensors | {"trunk.blocks.7.weight": torch.zeros(1)}, facts)
    other = json.dumps(json.loads(facts) | {"model": "Flux1"})
    assert "and this is a SD3" in refused(tensors, other)


# ------------------------------------------------------------ learning


def test_losses_by_hand():
    logit, label = torch.tensor([0.0, 2.0]), torch.tensor([0.25, 1.0])
    log2 = torch.tensor(2.0).log()
    assert torch.allclose(pointwise("bce", logit, label)[0], log2)
    assert torch.allclose(preference(logit[1:], logit[:1]), -torch.sigmoid(torch.tensor([2.0])).log())
    standard, link = targets("regression", torch.tensor([10.0, 30.0]))
    assert torch.allclose(link(standard), torch.tensor([10.0, 30.0]))
    assert torch.equal(pointwise("regression", standard, standard), torch.zeros(2))
    with pytest.raises(ValueError, match=r"reach from -1 to 1: use loss=bradley_terry"):
        targets("bce", torch.tensor([-1.0, 1.0]))


def test_a_latent_is_labelled_once_for_each_prompt_however_few_a_file_has():
    media = Media(prompts=6, per_prompt=2, strangers=3, prompts_per_file=4)
    parts = [{"x0": torch.zeros(2 * n, 1), "label": torch.ones(4, 2 * n)} for n in (4, 2)]
    found = merge(parts, media)
    examples = list(zip(found.latent.tolist(), found.prompt.tolist(), strict=True))
    assert len(examples) == len(set(examples)) == 8 * 4 + 4 * 2
    # Latents 2 i and 2 i + 1 are of prompt i, and a file has its own prompts only.
    assert {(latent, latent // 2) for latent in range(12)} < set(examples)
    assert all((latent < 8) == (prompt < 4) for latent, prompt in examples)


def test_pairs_are_of_one_prompt_and_of_different_labels():
    prompt, label = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1.0, 0.0, 2.0, 2.0, 3.0])
    of = pairs(prompt, label)
    assert of.tolist() == [[0, 1], [4, 2], [4, 3]]
    assert accuracy(label, of) == 1
    assert accuracy(-label, of) == 0
    assert accuracy(torch.zeros(5), of) == 0.5


@pytest.fixture
def program(compose: Callable[..., DictConfig], sd3_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """The training program on a random SD3 with a few pictures, labelled by their brightness; its result."""

    def run(folder: str, *overrides: str) -> Path:
        from flowalign.rewards.latent.__main__ import train

        words = (
            f"model.pretrained={sd3_folder}", "model.max_sequence_length=4", "train.prompts=3", "train.per_prompt=3",
            "train.strangers=1", "train.prompts_per_file=2", "val.prompts=2", "val.per_prompt=3", "build.blocks=1",
            "build.trained=1", "build.heads=2", "build.hidden=[8]", "fit.batch=4", "fit.schedule.warmup=0",
            "sampling.num_steps=2", "sigmas=[0.1,0.9]", "resolution.train.height=32", "resolution.train.width=32",
            "reward=jpeg", "fit.loss=regression", "fit.steps=6", "fit.save_every=3", *overrides,
        )  # fmt: skip
        train(compose(*words, name="latent_reward", paths=False), tmp_path / folder)
        return tmp_path / folder / "reward"

    return run


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(
    program: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    from flowalign.rewards.latent.training import Training

    with caplog.at_level("INFO"):
        whole = load_file(program("whole") / "reward.safetensors")
    assert "latents of prompt 3 of 3" in caplog.text  # although a file has room for two
    step = Training.loss

    def killed(self: Training, number: int) -> Tensor:
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Training, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        program("killed")
    monkeypatch.setattr(Training, "loss", step)
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("latents/*/*.safetensors")}
    assert len(made) == 3
    folder = program("killed")
    assert made == {p: p.stat().st_mtime_ns for p in made}  # none was made again
    again = load_file(folder / "reward.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert any(name.startswith("trunk.network.") for name in again)
    assert not any("to_add_out" in name for name in again)  # feeds only a block that is not there
    with pytest.raises(ConfigError, match="begun with other settings"):
        program("killed", "fit.lr=0.5")


@pytest.mark.slow
def test_it_learns_what_it_is_shown(program: Callable[..., Path], sd3: SD3):
    words = (
        "train.prompts=6",
        "fit.steps=150",
        "fit.batch=8",
        "fit.lr=3e-3",
        "fit.lr_blocks=3e-3",
        "train.strangers=0",
    )
    same = ("data.val=${data.train}", "val.prompts=6", "val.seed=0")
    folder = program("run", "fit.loss=bradley_terry", *words, *same)
    facts = json.loads((folder / "reward.json").read_text())
    assert facts["accuracy"]["0.1"] > 0.8
    assert facts["pairs"] > 10


def test_labels_that_do_not_differ_and_labels_of_another_range_are_refused(program: Callable[..., Path]):
    with pytest.raises(ValueError, match="loss=bce takes labels in"):
        program("a", "fit.loss=bce")
    with pytest.raises(ConfigError, match="no two latents of a prompt differ"):
        program("b", "reward.objective._target_=tests.rewards.test_latent.equal", "+reward.objective._partial_=true")


def equal(media: Tensor, prompts: list[str], metadata: list[dict[str, Any]], **settings: Any) -> Tensor:
    return torch.ones(len(media))


# ------------------------------------------------------------ runs


@pytest.fixture
def words(sd3_folder: Path, sd3_reward: Path) -> tuple[str, ...]:
    return (
        f"model.pretrained={sd3_folder}", "model.max_sequence_length=4", "reward=latent", "reward.held_out=null",
        f"reward.objective.weights={sd3_reward}", "trainer.check_val_every_n_epoch=9",
    )  # fmt: skip


def trained(cfg: DictConfig) -> Any:
    from flowalign.module import AlignModule
    from flowalign.run import build_recipe, build_trainer, plan_accumulation

    recipe = build_recipe(cfg)
    module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.fit(module)
    return trainer


def test_nothing_but_what_is_looked_at_is_decoded(
    tiny: Callable[..., DictConfig], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    decoded: list[int] = []
    decode = SD3.decode
    monkeypatch.setattr(SD3, "decode", lambda self, x: decoded.append(len(x)) or decode(self, x))
    trainer = trained(tiny("algo=nft", *words))
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert sum(decoded) == 2  # the first picture of each group


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_following_the_reward_raises_it(tiny: Callable[..., DictConfig], words: tuple[str, ...], tune: str):
    cfg = tiny("algo=prfl", *words, f"tune={tune}", "trainer.max_epochs=8", "optimizer.lr=3e-3", "algo.sft_weight=0",
               "logger=none", "batch.updates=1")  # fmt: skip
    seen: list[float] = []

    from lightning import Callback

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(float(trainer.callback_metrics["train/landing"]))

    from flowalign.module import AlignModule
    from flowalign.run import build_recipe, build_trainer, plan_accumulation

    recipe = build_recipe(cfg)
    trainer = build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.callbacks.append(Watch())
    trainer.fit(AlignModule(recipe))
    assert seen[-1] > seen[0]


def test_rewards_without_a_gradient_are_refused_and_the_advice_works(tiny: Callable[..., DictConfig]):
    for reward in ("shapes", "shapes_apart"):
        with pytest.raises(ConfigError, match="use reward=latent, or algo=nft"):
            check_groups(tiny("algo=prfl", f"reward={reward}"))
        check_groups(tiny("algo=nft", f"reward={reward}"))
    check_groups(tiny("algo=prfl", "reward=latent"))
    check_groups(tiny("algo=prfl"))


@pytest.mark.parametrize(("reward", "empty"), [("latent", False), ("brightness", True)])
def test_a_rank_without_values_reads_them_where_a_reward_is_made_of_them(
    tiny: Callable[..., DictConfig], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, reward: str, empty: bool
):
    """Of shards, rank 0 sends the others theirs, but only once the reward has taken its part of the network."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from flowalign.module import AlignModule
    from flowalign.run import build_recipe

    chosen = words if reward == "latent" else (words[0], words[1], f"reward={reward}")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    recipe = build_recipe(tiny("algo=nft", *chosen, "strategy=fsdp", "tune=full"))
    assert {p.is_meta for p in recipe.model.denoisers()["transformer"].parameters()} == {empty}
    AlignModule(recipe)  # binds
