"""What DistributedDataParallel must leave alone."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flowalign.models.quantised import is_quantised


def exclude_from_sync(module: nn.Module) -> None:
    """Exclude quantised weights and buffers from the synchronisation of DDP.

    DDP cannot broadcast quantised weights, and would send buffers (position tables) before every step, although every
    rank has read the same files.
    """
    names = [name for name, p in module.named_parameters() if is_quantised(p)]
    names += [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
