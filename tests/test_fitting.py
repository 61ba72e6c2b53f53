"""batch.micro=auto: the largest micro-batch that fits, with the results of one that is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from flowalign import fitting as memory
from flowalign.checks import ConfigError
from flowalign.exhausted import NoMemoryError
from flowalign.fitting import SHARE, fits_by_estimate, fits_by_trial, largest_fitting, search
from flowalign.geometry import Batch, Geometry
from flowalign.models.sd3 import SD3
from flowalign.module import AlignModule
from flowalign.planning import check_plan
from flowalign.run import build_recipe, build_trainer, compose_config, plan_accumulation
from flowalign.strategies import folders
from tests.conftest import settled
from tests.resuming.cells import ALGORITHMS, CHOSEN, fitting
from tests.strategies.jobs import Job, together

if TYPE_CHECKING:
    from omegaconf import DictConfig

MASKED = ("algo=flowawr", "algo.mask_zero=true")
CPU = torch.device("cpu")
SIZES = [1, 2, 3, 4, 6, 8, 9, 12, 18, 24, 36, 72]


# ------------------------------------------------------------ searching


@pytest.mark.parametrize("limit", [*SIZES, 0, 5, 7, 71, 1000])
def test_the_largest_that_fits_is_found_and_no_more_than_twice_of_it_is_tried(limit: int):
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit

    found = largest_fitting(SIZES, fits)
    assert found == max((size for size in SIZES if size <= limit), default=None)
    assert max(asked) <= max(2 * limit, next((size for size in SIZES if size >= 2 * limit), 72))
    assert len(asked) == len(set(asked)) < len(SIZES)


def test_all_ranks_take_the_smallest_answer():
    """As ranks do that ask the same in the same order, and hear of each other's answers."""
    limits = (24, 9, 40)
    asked: dict[int, list[int]] = {limit: [] for limit in limits}
    for limit in limits:

        def fits(size: int, limit: int = limit) -> bool:
            asked[limit].append(size)
            return size <= limit

        def agree(fits: bool, limit: int = limit) -> bool:
            return fits and all(asked[limit][-1] <= other for other in limits)

        assert search(SIZES, fits, agree) == 9
    assert asked[24] == asked[9] == asked[40]


def test_where_nothing_fits_one_sentence_names_settings():
    with pytest.raises(NoMemoryError, match=r"of 3 point\(s\), .*gradient_checkpointing=true.* batch.micro=3 tries it"):
        search([3, 6], lambda size: False, bool)


def test_what_is_counted_takes_its_share_of_the_room():
    fits = fits_by_estimate(lambda rows: 10 * rows, other=100, available=400 / SHARE)
    assert fits(30)
    assert not fits(31)


def test_a_container_may_have_less_than_its_machine(tmp_path: Path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert memory._cgroup_available(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup_available(tmp_path) == float("inf")
    assert 0 < memory.available_bytes(CPU, 2) < memory.available_bytes(CPU, 1)


# ------------------------------------------------------------ trying


def test_a_trial_has_all_gradients_in_place_and_leaves_none():
    layer = nn.Linear(3, 1)
    there: list[Any] = []

    def step(rows: int) -> None:
        there.extend(p.grad for p in layer.parameters())
        layer(torch.ones(rows, 3)).sum().backward()

    before = [p.detach().clone() for p in layer.parameters()]
    assert fits_by_trial(step, list(layer.parameters()), 8, CPU)(2)
    assert all(isinstance(grad, Tensor) for grad in there)
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))


def test_what_else_there_will_be_is_reserved_in_a_trial():
    steps: list[int] = []
    assert not fits_by_trial(steps.append, [], 2**60, CPU)(1)
    assert not steps


def test_other_errors_of_a_trial_pass():
    def step(rows: int) -> None:
        raise RuntimeError(f"a bug with {rows}")

    with pytest.raises(RuntimeError, match="a bug with 4"):
        fits_by_trial(step, [], 0, CPU)(4)


# ------------------------------------------------------------ the plan


@pytest.mark.parametrize(
    ("together", "expected"),
    [("point", [1, 2, 3, 4, 6, 9, 12, 18, 36]), ("sample", [3, 6, 9, 12, 18, 36]), ("group", [6, 12, 18, 36])],
)
def test_an_open_plan_may_take_every_micro_batch_that_a_given_one_may(together: Any, expected: list[int]):
    """36 points an update: 2 groups of 6 pictures with 3 points each."""
    g = Geometry(Batch(prompts=4, group_size=6, micro="auto", updates=2), 3, together=together)
    assert g.micros() == expected
    assert g.micro == expected[0]
    for micro in expected:
        assert g.with_micro(micro) == Geometry(Batch(4, 6, micro, updates=2), 3, together=together)
    assert g.with_micro(5) is g.with_micro(None) is g
    assert g.with_micro(36).with_micro(6).micro == 36  # what is given stays


def test_auto_passes_the_checks_of_a_command_line_and_a_misspelling_does_not():
    assert compose_config("batch.micro=auto").batch.micro == "auto"
    with pytest.raises(ValueError, match=r"batch.micro: expected an integer or 'auto', got 'atuo'; did you mean auto"):
        compose_config("batch.micro=atuo")


# ------------------------------------------------------------ runs


@pytest.fixture
def fit(tiny: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., AlignModule]:
    """Two epochs of some overrides in a folder of their own; twelve points, six of them an update."""

    def run(*overrides: str, resume: Path | None = None, callbacks: Any = ()) -> AlignModule:
        cfg = tiny(
            "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=99", "optimizer.eps=1e-3", "optimizer.lr=0.01",
            "algo=nft", f"paths.output_dir={tmp_path / 'run'}", *overrides,
        )  # fmt: skip
        recipe = build_recipe(cfg)
        module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
        trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
        trainer.fit(module, ckpt_path=resume)
        return module

    return run


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Makes the device one that is tried, whose memory is enough for so many rows with gradients; what it was asked."""

    def make(rows: int) -> list[int]:
        asked: list[int] = []
        forward = SD3.forward

        def limited(self: SD3, x: Tensor, t: Tensor, branch: Any) -> Tensor:
            if torch.is_grad_enabled():
                asked.append(len(x))
                if len(x) > rows:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return forward(self, x, t, branch)

        monkeypatch.setattr(SD3, "forward", limited)
        monkeypatch.setattr(AlignModule, "_can_try", lambda self: True)
        return asked

    return make


def apart(one: AlignModule, other: AlignModule) -> float:
    """The largest difference of what was trained."""
    theirs = other.live.trained()
    return max(float((p - theirs[name]).detach().abs().max()) for name, p in one.live.trained().items())


def test_the_run_is_that_of_a_given_micro_batch(fit: Callable[..., AlignModule]):
    found, given = fit("batch.micro=auto"), fit("batch.micro=2")
    assert (found.geometry.micro, found.geometry.accumulate, found.trainer.accumulate_grad_batches) == (6, 1, 1)
    assert found.trainer.global_step == given.trainer.global_step == 4
    assert found.trainer.num_training_batches == 2
    assert 0 < apart(found, given) < 1e-5
    names = {line.name for line in found.memory_plan()}
    assert "forward and backward of 6 points" in names
    assert found.geometry.table()["one optimiser step"] == "1 micro-batch × 6 points"


def test_a_device_that_is_too_small_gets_the_next_smaller_one(
    fit: Callable[..., AlignModule], small: Callable[[int], list[int]]
):
    given = fit("batch.micro=3")
    asked = small(5)
    found = fit("batch.micro=auto")
    assert asked == [1, 2, 6, 3] + [3] * 8
    assert found.geometry.micro == 3
    assert apart(found, given) == 0  # a search leaves no trace


def test_little_memory_of_the_machine_makes_small_micro_batches(
    fit: Callable[..., AlignModule], monkeypatch: pytest.MonkeyPatch
):
    module = fit("batch.micro=auto", "trainer.max_epochs=1")
    lines = {line.name: line.size for line in module.memory_plan()}
    row = lines["forward and backward of 6 points"] / 6
    besides = lines["gradients"] + lines["optimiser's state"] + lines["12 training points"]
    monkeypatch.setattr(memory, "_machine_available", lambda: (besides + 2.5 * row) / SHARE)
    assert fit("batch.micro=auto", "trainer.max_epochs=1").geometry.micro == 2
    monkeypatch.setattr(memory, "_machine_available", lambda: (besides + 0.5 * row) / SHARE)
    with pytest.raises(NoMemoryError, match=r"the smallest micro-batch, of 1 point\(s\), does not fit"):
        fit("batch.micro=auto")


@pytest.mark.parametrize("words", [("algo=crd",), MASKED])
def test_a_loss_with_means_over_the_micro_batch_is_refused(words: tuple[str, ...], compose: Callable[..., DictConfig]):
    with pytest.raises(ConfigError, match=r"would let the device choose the result, .* for example batch.micro=\d+"):
        check_plan(compose(*words, "batch.micro=auto"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [*((f"algo={name}",) for name in ALGORITHMS), ("algo=grpo_guard", "algo.parity=true"), MASKED],
    ids=" ".join,
)
def test_the_micro_batch_matters_only_where_the_algorithm_says_so(fit: Callable[..., AlignModule], words: Any):
    """Two updates, the second one off policy, of the smallest and of the largest micro-batches."""
    name = words[0].removeprefix("algo=")
    words = [*settled("trainer.max_epochs=1", "batch.updates=1", "batch.passes=2", *CHOSEN.get(name, ()), *words)]
    smallest, largest = (fit(*fitting([*words, f"batch.micro={micro}"])) for micro in (1, 9999))
    assert smallest.geometry.micro < largest.geometry.micro == largest.geometry.micros()[-1]
    gap = apart(smallest, largest)
    assert gap > 1e-4 if largest.recipe.algorithm.micro_matters else gap < 2e-5


class KilledError(Exception):
    """What happens to jobs."""


class Kill(lightning.Callback):
    """Ends the process at the start of the second epoch."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            raise KilledError


def test_a_resumed_run_takes_the_same_without_searching_and_is_exact(
    fit: Callable[..., AlignModule], small: Callable[[int], list[int]], tmp_path: Path
):
    asked, words = small(3), ("batch.micro=auto", "callbacks=checkpoint")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(KilledError):
        fit(*words, callbacks=[Kill()])
    assert torch.load(last, weights_only=True)["flowalign"]["micro"] == 3
    asked.clear()
    resumed = fit(*words, resume=last)
    assert asked == [3] * 4  # the second epoch
    straight = fit("batch.micro=auto")
    assert resumed.geometry == straight.geometry
    assert apart(resumed, straight) == 0


def test_what_does_not_divide_any_more_is_found_anew(
    fit: Callable[..., AlignModule], small: Callable[[int], list[int]], tmp_path: Path
):
    small(3)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    fit("batch.micro=auto", "callbacks=checkpoint", "trainer.max_epochs=1")
    resumed = fit("batch.micro=auto", "rollout.num_steps=3", resume=last)  # two points a picture, four an update
    assert (resumed.geometry.micros(), resumed.geometry.micro) == ([1, 2, 4], 2)


@pytest.mark.slow
def test_with_a_reward_of_noisy_latents_a_trial_asks_for_its_gradient(
    fit: Callable[..., AlignModule], small: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
):
    judged: list[int] = []
    monkeypatch.setattr(
        AlignModule, "_predicted_rewards", lambda self, p, v, cond: (judged.append(len(v)), v.flatten(1).mean(1))[1]
    )
    small(3)
    monkeypatch.setattr("flowalign.algorithms.nft.NFT.follows_reward", True)
    module = fit("batch.micro=auto", "trainer.max_epochs=1")
    assert module.geometry.micro == 3
    assert judged[:3] == [1, 2, 3]


@pytest.mark.slow
def test_two_processes_agree_and_keep_to_it_when_they_are_resumed(fit: Callable[..., AlignModule], tmp_path: Path):
    """The second has memory for two points only; afterwards it would have for all. Shards are read late."""
    lines = {line.name: line.size for line in fit("batch.micro=1", "tune.rank=4").memory_plan()}
    besides = lines["gradients"] + lines["optimiser's state"] + lines["12 training points"] / 2
    little = 2 * (besides + 2.5 * lines["forward and backward of 1 points"]) / SHARE  # for both
    jobs = []
    for strategy in ("ddp", "fsdp"):
        words = ["batch.micro=auto", f"strategy={strategy}", "trainer.devices=2", "trainer.max_epochs=2"]
        folder = str(tmp_path / strategy)
        jobs += [Job(folder, words, killed=1, rooms=[2**40, little])]
        jobs += [Job(folder, words, resume=str(jobs[-1].last), rooms=[2**40, 2**40]), Job(f"{folder}_free", words)]
    together(jobs, tmp_path)
    for name in ("ddp", "fsdp"):
        found = [folders.read(tmp_path / folder / "checkpoints" / "last.ckpt") for folder in (name, f"{name}_free")]
        assert [checkpoint["flowalign"]["micro"] for checkpoint in found] == [2, 6]
        assert {checkpoint["global_step"] for checkpoint in found} == {2}
