"""Two processes equal one: every strategy trains the embedded model as a single process does, and their checkpoints are
of one kind.

Importing takes longer than training here, so the jobs of a table run in one pair of processes and the tests read what
they left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.strategies import folders
from tests.models.tiny import wan2_2
from tests.strategies.jobs import Job, run, together

pytestmark = pytest.mark.timeout(1800)

# Far above the noise of float32: where a gradient is zero but for rounding, AdamW would make a whole step of it.
ALIKE = ("optimizer.eps=1e-3", "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=2")
CLIPPED = ("algo.kl_beta=0.01", "trainer.gradient_clip_val=0.1")
FULL = ("tune=full", "optimizer.lr=1e-4", *ALIKE, *CLIPPED)
LORA = ("optimizer.lr=1e-3", *ALIKE)
BF16 = (*FULL, "algo=grpo", "trainer.precision=bf16-mixed", "reward=brightness", "~reward.held_out")
"""A reward without thresholds, which rounding would cross."""
S = "trainer.strategy."
AREA = {"height": 32, "width": 48, "frames": 9}
SIZES = [f"resolution.{part}.{side}={n}" for part in ("train", "eval") for side, n in AREA.items()]
TYPES = ("model.dtype=float32", "model.train_dtype=float32", "model.max_sequence_length=16")
VIDEO = ("model=wan2_2_t2v", *TYPES, *SIZES, "reward=jpeg", "trainer.max_epochs=1")
LATE = ("algo=grpo", "trainer.max_epochs=1", "optimizer.lr=1e-3", "callbacks=default")
"""No frozen copy: the weights from before training wait elsewhere. With all callbacks, which act around it."""
LATE_KINDS = {"fsdp": ("tune=full", "strategy=fsdp"), "ddp": ("tune=lora", "strategy=ddp")}

Make = Callable[..., Job]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A job by name and words; the same name is the same job."""
    folder, made = tmp_path_factory.mktemp("jobs"), {}

    def make(name: str, *words: str, **more: Any) -> Job:
        return made.setdefault(name, Job(str(folder / name), list(words), **more))

    return make


@pytest.fixture(scope="module")
def done(job: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """What everybody runs: one process and two, and a run that is killed and goes on."""
    two = "trainer.devices=2"
    run(job("one_full", *FULL))
    run(job("one_lora", *LORA))
    jobs = [
        job("fsdp", *FULL, two, "strategy=fsdp"),
        job("killed", *FULL, two, "strategy=fsdp", killed=1),
        job("resumed", *FULL, two, "strategy=fsdp", resume=str(job("killed").last)),
        job("ddp", *LORA, two, "strategy=ddp"),
        *(job(f"late_{name}", *words, two, *LATE, late=True) for name, words in LATE_KINDS.items()),
    ]
    together(jobs, tmp_path_factory.mktemp("pair"))
    return job


@pytest.fixture(scope="module")
def more(done: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Everything else."""
    job, two = done, "trainer.devices=2"
    folder = tmp_path_factory.mktemp("wan")
    wan2_2.build().save_pretrained(folder)
    video = (*FULL, *VIDEO, f"model.pretrained={folder}")
    adapters = (*LORA, *VIDEO, f"model.pretrained={folder}")
    base16 = (*LORA, "+model.train_dtype=bfloat16")
    kinds = {"one_bf16": BF16, "one_video": video, "one_video_lora": adapters, "one_base16": base16}
    for name, words in kinds.items():
        run(job(name, *words))
    run(job("one_killed", *FULL, killed=1))
    late = (f"{S}sync_each_micro=false", "running.gradient_checkpointing=true")
    in_folder = (*FULL, two, "strategy=fsdp", f"{S}checkpoint=folder")
    jobs = [
        job("hsdp", *FULL, two, "strategy=hsdp", f"{S}replicas=2"),
        job("offload", *FULL, two, "strategy=fsdp_offload"),
        job("frozen_on_cpu", *FULL, two, "strategy=fsdp", "policy.device_of_frozen=cpu"),
        job("late", *FULL, two, "strategy=fsdp", *late),
        job("lora", *LORA, two, "strategy=fsdp"),
        job("base16", *base16, two, "strategy=fsdp"),
        job("bf16", *BF16, two, "strategy=fsdp"),
        job("folder", *in_folder, killed=1),
        job("folder_resumed", *in_folder, resume=str(job("folder").last)),
        job("folder_to_file", *FULL, two, "strategy=fsdp", resume=str(job("folder").last)),
        job("one_to_two", *FULL, two, "strategy=fsdp", resume=str(job("one_killed").last)),
        job("video", *video, two, "strategy=fsdp"),
        job("video_shared", *video, two, "strategy=fsdp_cp"),
        job("video_ddp", *adapters, two, "strategy=ddp", "trainer.strategy=ddp_find_unused_parameters_true"),
        job("no_plan", *FULL, two, "strategy=fsdp_cp", refused=True),
        job("other_rank", two, "strategy=fsdp", resume=str(job("killed").last), refused=True),
    ]
    together(jobs, tmp_path_factory.mktemp("pair"))
    run(job("two_to_one", *FULL, resume=str(job("killed").last)))
    run(job("folder_to_one", *FULL, resume=str(job("folder").last)))
    return job


def apart(one: Job, other: Job) -> float:
    """The largest difference of what two runs trained and kept, moments of the optimiser included."""
    a, b = folders.read(one.last), folders.read(other.last)
    assert a["state_dict"].keys() == b["state_dict"].keys()
    states = a["optimizer_states"][0], b["optimizer_states"][0]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    gaps = [float((t - b["state_dict"][key]).abs().max()) for key, t in a["state_dict"].items()]
    for i, moments in states[0]["state"].items():
        gaps += [float((t - states[1]["state"][i][name]).abs().max()) for name, t in moments.items()]
    return max(gaps)


def logged(name: str, *jobs: Job) -> list[tuple[float, ...]]:
    """A metric of some jobs, by epoch."""
    return list(zip(*([epoch[name] for epoch in job.metrics] for job in jobs), strict=True))


def test_sharded_full_training_is_that_of_one_process(done: Make):
    """With a norm that clips, two micro-batches a step, and two frozen copies."""
    assert apart(done("one_full"), done("fsdp")) <= 1e-6
    both = done("one_full"), done("fsdp")
    assert all(a == pytest.approx(b, abs=1e-5) for a, b in logged("train/loss", *both))
    assert all(a == pytest.approx(b, rel=1e-4) and a > 0.1 for a, b in logged("train/grad_norm", *both))


def test_adapters_of_two_processes_are_those_of_one(done: Make):
    assert apart(done("one_lora"), done("ddp")) <= 1e-6


@pytest.mark.parametrize("kind", LATE_KINDS)
def test_a_late_baseline_of_two_processes_is_that_of_before(done: Make, kind: str):
    first, second = (done(f"late_{kind}").rank(rank) for rank in (0, 1))
    assert first["late"] == second["late"] == first["at_once"]
    assert first["late"]["test/velocity_rms"] > 0


def test_a_sharded_run_resumes_to_the_last_bit(done: Make):
    assert apart(done("fsdp"), done("resumed")) == 0
    assert done("fsdp").metrics[-1]["train/loss"] == done("resumed").metrics[-1]["train/loss"]
    assert done("fsdp").metrics[-1]["val/reward"] == done("resumed").metrics[-1]["val/reward"]


def test_only_the_first_rank_reads_the_trained_network(done: Make):
    assert done("killed").rank(0)["meta"] == 0
    assert done("killed").rank(1)["meta"] == 1


def test_a_checkpoint_of_shards_is_one_like_any_other(done: Make):
    one, two = (folders.read(done(name).last) for name in ("one_full", "fsdp"))
    assert {k: t.shape for k, t in one["state_dict"].items()} == {k: t.shape for k, t in two["state_dict"].items()}
    assert all(type(t) is torch.Tensor for t in two["state_dict"].values())


def test_what_is_exported_of_shards_is_what_was_trained(done: Make, tmp_path: Path):
    from diffusers import SD3Transformer2DModel

    from flowalign.commands.export import export

    export(str(done("fsdp").last), str(tmp_path))
    exported = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    prefix = "policy.denoisers.transformer."
    trained = folders.read(done("fsdp").last)["state_dict"]
    assert all(torch.equal(t, trained[prefix + key]) for key, t in exported.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hsdp", "offload", "late", "frozen_on_cpu"])
def test_every_kind_of_sharding_is_one_process(more: Make, name: str):
    assert apart(more("one_full"), more(name)) <= 1e-6


@pytest.mark.slow
def test_offloaded_shards_do_not_differ_in_a_bit(more: Make):
    assert apart(more("fsdp"), more("offload")) == 0


@pytest.mark.slow
def test_sharded_adapters_are_those_of_one_process(more: Make):
    assert apart(more("one_lora"), more("lora")) <= 1e-6


@pytest.mark.slow
def test_float32_adapters_and_their_bfloat16_base_share_shards(more: Make):
    """Products of another number of rows are rounded otherwise in bfloat16, hence the tolerance."""
    assert apart(more("one_base16"), more("base16")) <= 1e-2
    assert {t.dtype for t in folders.read(more("base16").last)["state_dict"].values()} == {torch.float32}


@pytest.mark.slow
def test_in_bfloat16_the_policy_is_one_and_its_weights_stay_float32(more: Make):
    assert all(m["train/on_policy_gap"] < 1e-3 for m in more("bf16").metrics)
    assert {t.dtype for t in folders.read(more("bf16").last)["state_dict"].values()} == {torch.float32}
    norms = logged("train/grad_norm", more("one_bf16"), more("bf16"))
    assert all(a == pytest.approx(b, rel=0.02) for a, b in norms)


@pytest.mark.slow
def test_folders_resume_to_the_last_bit_and_become_files(more: Make):
    assert folders.is_folder(more("folder").last)
    assert not folders.is_folder(more("folder_to_file").last)
    assert apart(more("fsdp"), more("folder_resumed")) == 0
    assert apart(more("fsdp"), more("folder_to_file")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_to_two", "two_to_one", "folder_to_one"])
def test_a_run_goes_on_with_another_number_of_processes(more: Make, name: str):
    assert apart(more("one_full"), more(name)) <= 1e-6


@pytest.mark.slow
def test_sharded_experts_are_asked_together(more: Make):
    assert apart(more("one_video"), more("video")) <= 1e-6
    assert sum(more("video").rank(i)["asked_for_others"] for i in (0, 1)) > 0  # otherwise this shows nothing


@pytest.mark.slow
def test_experts_with_adapters_train_under_ddp(more: Make):
    assert apart(more("one_video_lora"), more("video_ddp")) <= 1e-6


@pytest.mark.slow
def test_a_shared_sequence_trains_as_a_whole_one(more: Make):
    assert apart(more("one_video"), more("video_shared")) <= 1e-6


@pytest.mark.slow
def test_a_family_without_a_plan_is_refused_in_a_sentence(more: Make):
    assert "no plan for splitting the sequences of SD3Transformer2DModel: use strategy=fsdp" in more("no_plan").metrics


@pytest.mark.slow
def test_a_checkpoint_of_another_kind_is_refused_on_all_ranks(more: Make):
    assert "does not fit this run" in more("other_rank").metrics
