"""A config folder small enough to read, with everything that the real one has."""

from pathlib import Path

import pytest

TOYS = "tests.checks.toys"
FILES = {
    "train.yaml": """
        defaults:
          - _self_
          - algo: nft
          - dynamics: ode
          - logger: csv
          - resolution: "64"
          - experiment: null
        task_name: train
        seed: 42
        train: true
        ckpt_path: null
        rollout: {num_steps: 10, guidance: 4.5}
        evaluation: {num_steps: 20, width: "${resolution.width}"}
        output: ${hydra:runtime.output_dir}/${hydra:job.num}
    """,
    "eval.yaml": "defaults: [_self_, {algo: nft}]\nckpt_path: ???",
    "broken.yaml": "defaults: [_self_, {algo: nft}]\nwidth: ${algo.kl_bta}",
    "sweeps.yaml": """
        defaults: [train, _self_]
        hydra: {mode: MULTIRUN, sweeper: {params: {algo.kl_bta: "0,1"}}}
    """,
    "algo/nft.yaml": "{_target_: TOYS.NFT, beta: 1.0, kl_beta: 1.0e-4, adv_range: null}",
    "algo/grpo.yaml": "{_target_: TOYS.GRPO, dynamics: '${dynamics}', clip: 1.0e-4, kl_beta: 0.0, kl: x}",
    "algo/absent.yaml": "{_target_: TOYS.NTF}",
    "dynamics/ode.yaml": "{_target_: builtins.dict, stochastic: false}",
    "dynamics/cps.yaml": "{_target_: builtins.dict, stochastic: true, eta: 0.7}",
    "logger/csv.yaml": "csv: {_target_: TOYS.Logger, folder: a}",
    "logger/tensorboard.yaml": "tensorboard: {_target_: TOYS.Logger, folder: b}",
    "resolution/64.yaml": "{width: 64}",
    "resolution/128.yaml": "{width: 128}",
    "experiment/sd3/quick.yaml": "# @package _global_\nrollout: {num_steps: 4}",
    "experiment/long.yaml": "# @package _global_\nrollout: {num_steps: 40}",
    "experiment/torn.yaml": "# @package _global_\nrollout: {num_steps: 40",
    "spare/one.yaml": "x: 1",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    from textwrap import dedent

    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text).replace("TOYS", TOYS))
    return folder


@pytest.fixture(scope="session")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("conf"), FILES)
