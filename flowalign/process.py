"""What a process of ours begins with."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from omegaconf import DictConfig

from flowalign.launching import choose_device


def begin_process(cfg: DictConfig) -> None:
    """What holds for all of this process: precision of products, its GPU, the seeds of global generators."""
    import lightning
    import torch

    torch.set_float32_matmul_precision("high")
    choose_device(cfg.trainer)
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)


def quieten() -> None:
    """Leaves out what libraries say about themselves: advice, absent accelerators, absent torchvision."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Of ours, what is logged without it is the same on all ranks already.
    warnings.filterwarnings("ignore", message=".*when logging on epoch level in distributed setting.*")
    warnings.filterwarnings("ignore", message=".*torch.distributed.nn.functional.all_gather is deprecated.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # see check_tasks
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")  # see Csv
    warnings.filterwarnings("ignore", message=".*instantiated without `get_apply_tensor_subclass`.*")
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):  # whose parts may be absent
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.callbacks.model_checkpoint", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def find_own_modules() -> None:
    """Configs may name rewards and other classes of modules in the current folder, whichever way we were started."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
