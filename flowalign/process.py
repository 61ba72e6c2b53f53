"""Set-up of a process."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from omegaconf import DictConfig

from flowalign.launching import choose_device


def begin_process(cfg: DictConfig) -> None:
    """Set the matmul precision, the current GPU and the seeds of the global generators."""
    import lightning
    import torch

    torch.set_float32_matmul_precision("high")
    choose_device(cfg.trainer)
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)


def silence_libraries() -> None:
    """Silence irrelevant messages of libraries: advice, missing accelerators, missing torchvision."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # What flowalign logs without sync_dist is already equal on all ranks.
    warnings.filterwarnings("ignore", message=".*when logging on epoch level in distributed setting.*")
    # Of a kind of prompt, a rank may have none, while others do.
    warnings.filterwarnings("ignore", message=".*method of metric MeanMetric was called before the ``update`` method.*")
    warnings.filterwarnings("ignore", message=".*torch.distributed.nn.functional.all_gather is deprecated.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # see check_tasks
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")  # see Csv
    warnings.filterwarnings("ignore", message=".*instantiated without `get_apply_tensor_subclass`.*")
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):  # optional parts may be missing
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.callbacks.model_checkpoint", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def add_cwd_to_path() -> None:
    """Add the current folder to sys.path, so that configs may name classes of modules there."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
