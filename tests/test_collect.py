"""The rollout phase on the embedded model: the same points whatever the batch, the ranks and what is shared."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.checks import ConfigError
from flowalign.collect import Collector
from flowalign.conditioner import Conditioner
from flowalign.models.base import FlowModel
from flowalign.recipe import batch_plan
from flowalign.run import build_recipe, size_of
from flowalign.scoring import ScoreQueue, Scorer
from flowalign.types import Conditioning, required

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from flowalign.collect import Collected


@dataclass
class Phase:
    """What one rank collected, by which collector."""

    got: Collected
    collector: Collector
    rewards: Tensor
    """(n, R) of this rank, as the scorer gave them."""
    reported: list[int]
    """Samples done, at every report."""


def settled(
    collector: Collector,
    gather: Callable[[Tensor], Tensor],
    epoch: int = 0,
    rank: int = 0,
    report: Callable[[int, float | None], None] = lambda done, reward: None,
) -> Collected:
    """A whole rollout phase."""
    with ScoreQueue(collector.scorer.ahead) as queue:
        got = collector(epoch, rank, torch.device("cpu"), queue, gather, report)
        got.assign_credit()
    return got


@pytest.fixture
def collect(tiny: Callable[..., DictConfig], random_sd3: tuple[str, ...]) -> Callable[..., Phase]:
    """Two prompts × 4 pictures unless overrides say otherwise; the rewards of other ranks are those of the number."""

    def collected(
        *overrides: str, rank: int = 0, ranks: int = 1, epoch: int = 0, scorer: Scorer | None = None, **declared: Any
    ) -> Phase:
        r = build_recipe(tiny("batch.group_size=4", "batch.micro=1", *random_sd3, *overrides))
        r.scorer = scorer or r.scorer
        for name, value in declared.items():
            setattr(r.algorithm, name, value)
        geometry = batch_plan(r, ranks)
        collector = Collector(
            r.model, r.algorithm, r.dynamics, r.steps, r.times, r.rollout, r.credit, r.scorer, r.data["train"],
            Conditioner(r.model, guided=False), geometry, r.train_size, r.seed,
        )  # fmt: skip
        everyone, mine = torch.arange(geometry.samples).float()[:, None], []
        reported: list[int] = []

        def gather(rewards: Tensor) -> Tensor:
            mine.append(rewards)
            return everyone.expand(-1, rewards.shape[1])

        with torch.no_grad():
            got = settled(collector, gather, epoch, rank, lambda done, reward: reported.append(done))
        return Phase(got, collector, torch.cat(mine) if mine else torch.empty(0), reported)

    return collected


@pytest.mark.parametrize("algo", ["grpo", "nft"])
def test_a_rollout_does_not_depend_on_its_batch_size(collect: Callable[..., Phase], algo: str):
    small, large = (collect(f"algo={algo}", f"rollout.batch_size={size}").got.points for size in (2, 8))
    assert torch.equal(small.sigma, large.sigma)
    assert torch.equal(small.advantage, large.advantage)
    assert torch.allclose(small.x, large.x, atol=5e-5)  # matrix products round differently with the batch
    if small.eps is not None:
        assert torch.equal(small.eps, required(large.eps, "eps"))
        assert torch.allclose(required(small.x0, "x0"), required(large.x0, "x0"), atol=5e-5)
    else:
        assert torch.allclose(required(small.log_prob, "log_prob"), required(large.log_prob, "log_prob"), atol=1e-5)


@pytest.mark.parametrize("same_noise", ["false", "true"])
def test_ranks_divide_what_one_process_would_make(collect: Callable[..., Phase], same_noise: str):
    overrides = ("algo=grpo", "steps=window", f"rollout.same_noise={same_noise}")
    whole = collect(*overrides).got
    per_sample = len(whole.points.x) // 8
    seen = []
    for rank in range(2):
        half = collect(*overrides, rank=rank, ranks=2)
        mine = half.collector.geometry.local_samples(rank)
        seen += mine
        for name in ("x", "sigma", "advantage", "group", "sample"):
            one, other = getattr(half.got.points, name), getattr(whole.points, name)
            assert torch.allclose(one, other.unflatten(0, (8, per_sample))[mine].flatten(0, 1), atol=5e-5), name
    assert sorted(seen) == list(range(8))


@pytest.mark.parametrize("ragged", [False, True])
def test_a_rank_encodes_what_it_samples_unless_padding_depends_on_the_others(
    collect: Callable[..., Phase], monkeypatch: pytest.MonkeyPatch, ragged: bool
):
    overrides = ("algo=nft", "batch.extremes=2")  # whole groups on every rank
    whole = collect(*overrides).got
    monkeypatch.setattr(FlowModel, "one_text_length", not ragged)
    for rank in range(2):
        half = collect(*overrides, rank=rank, ranks=2).got
        assert half.cond.batch_size == (2 if ragged else 1)
        rows = whole.prompt_of_point[whole.prompt_of_point == rank]
        for name, entry in half.cond.index(half.prompt_of_point).items():
            assert torch.equal(entry, whole.cond[name][rows]), name


@pytest.mark.parametrize("extremes", ["null", "2"])
def test_what_is_encoded_ahead_is_all_that_the_next_epoch_encodes(
    collect: Callable[..., Phase], monkeypatch: pytest.MonkeyPatch, extremes: str
):
    collector = collect("algo=nft", f"batch.extremes={extremes}", rank=1, ranks=2).collector
    collector.encode_ahead(5, rank=1)
    monkeypatch.setattr(collector.model, "encode", None)
    with torch.no_grad():
        settled(collector, lambda rewards: torch.arange(8.0)[:, None].expand(-1, rewards.shape[1]), epoch=5, rank=1)


def test_mixgrpo_with_a_full_window_is_grpo(collect: Callable[..., Phase]):
    window = collect("algo=mixgrpo", "steps.width=4", "steps.skip=0", epoch=3)
    plain = collect("algo=grpo", "steps=all", "steps.trained=1.0", epoch=3)
    assert len(plain.got.points.x) == 8 * 4
    losses = []
    for phase in (window, plain):
        p, v = phase.got.points, torch.zeros_like(phase.got.points.x)
        losses.append(phase.collector.algorithm.loss(p, v)[0])
        for name in ("x", "x_next", "sigma", "advantage"):
            assert torch.equal(required(getattr(p, name), name), required(getattr(plain.got.points, name), name)), name
    assert torch.equal(*losses)
    assert losses[0].unique().numel() > 1


def test_points_know_their_group_their_sample_and_their_noise(collect: Callable[..., Phase]):
    p = collect("algo=grpo").got.points
    assert required(p.sample, "sample").tolist() == [s for s in range(8) for _ in range(3)]
    assert required(p.group, "group").tolist() == [g for g in range(2) for _ in range(12)]
    assert required(p.std_scale, "std_scale").shape == (24,)


def test_calls_of_the_network_are_counted(collect: Callable[..., Phase]):
    assert collect("algo=nft").got.calls == 8 * 4
    window = ("algo=grpo", "steps=window", "steps.stay=1", "steps.width=1", "rollout.batch_size=8")
    assert collect(*window, "rollout.same_noise=false", epoch=1).got.calls == 8 * 4
    shared = collect(*window, "rollout.same_noise=true", epoch=1)
    assert shared.got.calls == 2 * 2 + 8 * 2
    torn = collect(*window, "rollout.same_noise=true", "rollout.batch_size=2", epoch=1)
    assert torn.got.calls == 4 * 2 + 8 * 2  # a group does not fit into a batch
    assert torch.allclose(shared.got.points.x, torn.got.points.x, atol=5e-5)
    uneven = collect(*window, "rollout.same_noise=true", "rollout.batch_size=7", epoch=1)
    assert uneven.got.calls == shared.got.calls  # batches of one whole group


def test_flash_makes_fewer_calls(collect: Callable[..., Phase]):
    window = ("algo=grpo", "steps=window", "rollout.num_steps=8", "rollout.same_noise=false")
    full, flash = collect(*window), collect(*window, "steps.tail=0.4")
    assert full.got.calls == 8 * 8
    assert flash.got.calls == 8 * (2 + 1)
    for name in ("x", "x_next", "log_prob", "sigma_next"):
        assert torch.equal(getattr(full.got.points, name), getattr(flash.got.points, name))


def test_branches_are_compared_with_those_of_their_own_step(collect: Callable[..., Phase]):
    """8 pictures a prompt: 2 trunks × 2 steps × 2 branches."""
    phase = collect("algo=grpo", "batch.group_size=8", "steps=branch", "steps.branches=2", "steps.num=2")
    p = phase.got.points
    assert len(p.x) == 16
    assert required(p.group, "group").tolist() == [g for g in range(8) for _ in range(2)]
    # The made-up rewards are the numbers of the samples: within a pair the second one is better.
    assert (p.advantage.reshape(8, 2) * torch.tensor([-1, 1]) > 0).all()
    assert torch.equal(p.x[0::2], p.x[1::2])  # both leave the same state
    assert required(p.std_scale, "std_scale").unique().numel() == 1
    assert p.sigma.reshape(2, 2, 2, 2).unique(dim=0).shape[0] == 1  # the same steps everywhere
    steps = phase.collector.plan(0).trained
    # A batch holds a trunk. Before the first step a row, then two branches more with each step.
    assert phase.got.calls == 4 * sum(1 + 2 * sum(s < i for s in steps) - (i > steps[1]) for i in range(4))


# ------------------------------------------------------------ what an algorithm declares


def test_members_of_a_group_may_share_their_noise(collect: Callable[..., Phase]):
    p = collect("algo=nft", "batch.micro=4", shared_noise=True, together="group").got.points
    eps, sigma = required(p.eps, "eps").unflatten(0, (2, 4, 3)), p.sigma.unflatten(0, (2, 4, 3))
    assert torch.equal(eps, eps[:, :1].expand_as(eps))
    assert torch.equal(sigma, sigma[:, :1].expand_as(sigma))
    assert not torch.equal(eps[0, 0], eps[1, 0])
    assert not torch.equal(eps[0, 0, 0], eps[0, 0, 1])
    assert required(p.group, "group").tolist() == [0] * 12 + [1] * 12
    own = collect("algo=nft").got.points
    assert torch.equal(required(own.eps, "eps")[:3], required(p.eps, "eps")[:3])  # that of the group's first member


@pytest.mark.parametrize("asks", ["algorithm", "user"])
@pytest.mark.parametrize(("members", "kept"), [(2, [0, 3, 4, 7]), (3, [0, 2, 3, 4, 6, 7])])
def test_training_on_the_best_and_the_worst(collect: Callable[..., Phase], members: int, kept: list[int], asks: str):
    """The made-up rewards rise with the number of the sample. Credit is that of the whole group."""
    by_user = asks == "user"
    words, declared = ([f"batch.extremes={members}"], {}) if by_user else ([], {"samples_per_group": members})
    p = collect("algo=nft", *words, **declared).got.points
    assert required(p.sample, "sample").tolist() == [s for s in kept for _ in range(3)]
    whole = collect("algo=nft").got
    rows = torch.tensor([3 * s + j for s in kept for j in range(3)])
    assert torch.equal(p.x, whole.points.x[rows])
    assert torch.equal(p.advantage, whole.points.advantage[rows])


def test_who_has_no_score_is_trained_on_only_where_its_group_has_too_few_others(collect: Callable[..., Phase]):
    """Best three and worst two of eight; of the second group only two could be scored."""
    phase = collect("algo=nft", "batch.group_size=8", samples_per_group=5)
    rewards = torch.arange(16.0)[:, None]
    rewards[[0, 7, 3, 8, 9, 10, 12, 13, 15]] = torch.nan
    phase.collector.scorer = Scorer(lambda media, *_: torch.zeros(len(media)), max_missing=1)
    with torch.no_grad():
        got = settled(phase.collector, lambda _: rewards)
    samples = required(got.points.sample, "sample")[::3]
    scored = got.points.counts[::3]
    assert samples[:5].tolist() == [1, 2, 4, 5, 6]
    assert scored[:5].all()
    assert {11, 14} <= set(samples[5:].tolist())
    assert samples[5:][scored[5:]].tolist() == [11, 14]
    assert float(required(got.points.weight, "weight").mean()) == pytest.approx(1)


def test_real_pictures_replace_the_rollout(collect: Callable[..., Phase]):
    words = ("algo=nft", "model.pretrained=tiny_sd3", "reward=shapes")  # which know them, as a random model does not
    phase = collect(*words, source="images")
    got = phase.got
    assert got.calls == 0
    assert got.points.advantage.unique().tolist() == [1.0]
    assert len(got.points.x) == 8 * 3
    assert got.images.shape[0] == 2
    x0 = required(got.points.x0, "x0")[::3]
    assert len(x0.flatten(1).unique(dim=0)) == 8  # every member of a group is a picture of its own
    collector = phase.collector
    assert torch.allclose(collector.model.decode(x0[:1])[0], got.images[0], atol=0.3)
    scores = collector.scorer.rewards(collector.model.decode(x0), got.prompts)
    assert scores.mean() > 0.7  # they show what the prompts ask for
    assert torch.equal(x0, required(collect(*words, source="images").got.points.x0, "x0")[::3])
    assert not torch.equal(x0, required(collect(*words, source="images", epoch=1).got.points.x0, "x0")[::3])


def test_a_given_picture_is_encoded_once_however_many_members_learn_from_it(
    collect: Callable[..., Phase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lines = []
    for name in "ab":
        Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / f"{name}.png")
        lines.append(json.dumps({"prompt": name, "image": f"{name}.png"}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    encoded, encode = [], FlowModel.encode_images

    def counted(model: FlowModel, images: Tensor) -> Tensor:
        encoded.append(len(images))
        return encode(model, images)

    monkeypatch.setattr(FlowModel, "encode_images", counted)
    words = (f"data.train.path={tmp_path / 'train.jsonl'}", "data.train.balance=null", "rollout.batch_size=3")
    phase = collect("algo=nft", *words, source="images")
    got = phase.got
    assert encoded == [2]
    assert phase.reported == [3, 6, 8]  # ranks synchronise at reports: their number depends on no rank's pictures
    assert len(got.images) == 2
    groups = got.x0.unflatten(0, (2, 4))
    assert torch.equal(groups, groups[:, :1].expand_as(groups))
    assert not torch.equal(groups[0, 0], groups[1, 0])


def test_a_plan_that_grows_is_refused(collect: Callable[..., Phase]):
    with pytest.raises(ValueError, match=r"epoch 2 trains 1 steps .* made for 2"):
        collect("algo=grpo", "steps=window", "steps.skip=1", "steps.parity=true", "steps.stay=1", epoch=2)


def test_an_epoch_without_a_single_score_is_refused(collect: Callable[..., Phase]):
    collector = collect("algo=nft").collector
    nothing = torch.full((8, 1), torch.nan)
    with torch.no_grad(), pytest.raises(RuntimeError, match="not a single picture"):
        settled(collector, lambda _: nothing)


def test_several_rewards_reach_the_credit_apart(collect: Callable[..., Phase]):
    """The weighted sum of the two rewards is the same for all; apart, the second is constant and says nothing."""
    collector = collect("algo=nft", "reward=shapes_apart", "credit=gdpo").collector
    one = torch.tensor([1.0, 2, 3, 4] * 2)
    advantages, stats = {}, {}
    for name, rewards in {"opposed": torch.stack([one, -one], 1), "constant": torch.stack([one, 0 * one], 1)}.items():
        with torch.no_grad():
            got = settled(collector, lambda _, everyone=rewards: everyone)
        advantages[name], stats[name] = got.points.advantage[::3], got.stats
    assert advantages["opposed"].abs().max() == 0
    assert advantages["constant"].reshape(2, 4).diff(dim=1).min() > 0  # in the order of the first
    assert stats["constant"]["reward/strict"] == 2.5
    assert stats["constant"]["reward/partial"] == 0
    assert stats["constant"]["reward_mean"] == 1.25  # half of each


# ------------------------------------------------------------ what rewards ask for


class Compared:
    """The share of the group that is darker: it says nothing of a torn group."""

    groupwise = True

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]], groups: Tensor) -> Tensor:
        self.calls.append(groups.tolist())
        light, same = media.flatten(1).mean(1), groups[:, None] == groups
        return ((light[:, None] > light) & same).sum(1) / same.sum(1)


@pytest.mark.parametrize("size", [1, 3, 5, 6, 8])
def test_a_groupwise_reward_sees_whole_groups_whatever_the_batch(collect: Callable[..., Phase], size: int):
    phase = collect("algo=nft", f"rollout.batch_size={size}", scorer=Scorer(reward := Compared()))
    assert [g for call in reward.calls for g in call] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all(call.count(g) == 4 for call in reward.calls for g in call)
    assert phase.rewards.reshape(2, 4).sort(dim=1).values.flatten().tolist() == [0, 0.25, 0.5, 0.75] * 2


def test_groups_of_a_groupwise_reward_are_dealt_whole_to_the_ranks(collect: Callable[..., Phase]):
    seen = []
    for rank in range(2):
        collect("algo=nft", rank=rank, ranks=2, scorer=Scorer(reward := Compared()))
        seen += reward.calls
    assert seen == [[0] * 4, [1] * 4]


def test_branches_are_what_a_groupwise_reward_compares(collect: Callable[..., Phase]):
    branches = ("algo=grpo", "batch.group_size=8", "steps=branch", "steps.branches=2", "steps.num=2")
    collect(*branches, scorer=Scorer(reward := Compared()))
    assert [g for call in reward.calls for g in call] == [g for g in range(8) for _ in range(2)]


class OfLatents:
    """The mean of a latent, and of its prompt's conditioning."""

    sees = "latents"

    def of_latents(self, x0: Tensor, cond: Conditioning, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        assert len(x0) == cond.batch_size == len(prompts) == len(metadata)
        return x0.flatten(1).mean(1)


def test_rewards_of_latents_decode_only_what_is_looked_at(collect: Callable[..., Phase], monkeypatch: Any):
    decoded: list[int] = []
    decode = FlowModel.decode

    def counted(self: FlowModel, x: Tensor) -> Tensor:
        decoded.append(len(x))
        return decode(self, x)

    monkeypatch.setattr(FlowModel, "decode", counted)
    phase = collect("algo=nft", scorer=Scorer(OfLatents()))
    assert sum(decoded) == 2
    x0 = required(phase.got.points.x0, "x0")[::3]
    assert torch.allclose(phase.rewards[:, 0], x0.flatten(1).mean(1))
    decoded.clear()
    both = collect("algo=nft", scorer=Scorer({"latent": OfLatents(), "light": Compared()}))
    assert sum(decoded) == 8
    assert torch.equal(both.rewards[:, 0], phase.rewards[:, 0])
    assert torch.allclose(both.got.images, phase.got.images, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "area"), [(96, (96, 96, None)), ([96, 64], (96, 64, None)), ([96, 64, 5], (96, 64, 5))]
)
def test_a_resolution_is_a_number_or_a_list(tiny: Callable[..., DictConfig], given: Any, area: tuple[int, ...]):
    cfg = tiny()
    cfg.resolution.train = given
    assert size_of(cfg, "train").area == area
    assert size_of(cfg, "eval").area == (64, 64, None)
    assert size_of(tiny("resolution.train=96"), "train").area == (96, 96, None)


@pytest.mark.parametrize("given", [[96], [96, 64, 5, 1], "wide", ["a", "b"], 1.5, True])
def test_another_resolution_is_refused(tiny: Callable[..., DictConfig], given: Any):
    cfg = tiny()
    cfg.resolution.eval = given
    with pytest.raises(ConfigError, match="resolution.eval: a resolution is the side of a square"):
        size_of(cfg, "eval")
