"""The sharding strategy: FSDP2 over all ranks or within replicas (hybrid sharding), with optional CPU offload."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from flowalign.checks.errors import ConfigError
from flowalign.models.base import FlowModel
from flowalign.strategies import folders
from flowalign.strategies.sequence import check_plan, split_sequences
from flowalign.strategies.shard import shard
from flowalign.tensors import KeyPath, gather_to_cpu, join_tensors, like, split_tensors


class Sharded(ModelParallelStrategy):
    """Shards weights, gradients, optimiser state and frozen copies of the denoisers; a block is gathered while it runs.

    The ranks form `replicas` groups, each of which holds everything once; `context` neighbouring ranks process the same
    samples, each a part of every sequence. Checkpoints are interchangeable with those of any other strategy.
    """

    def __init__(
        self,
        replicas: int = 1,
        context: int = 1,
        offload: bool = False,
        gather_16: bool = True,
        sync_each_micro: bool = True,
        checkpoint: Literal["file", "folder"] = "file",
        timeout_minutes: float = 30.0,
    ) -> None:
        """offload: keep shards and optimiser state in CPU memory.

        gather_16: gather weights in bfloat16 under trainer.precision=bf16-mixed. sync_each_micro=false accumulates
        gradients of a step locally: less traffic, but unsharded gradients on every rank. checkpoint: with "folder",
        every rank writes its shards; a "file" is gathered and written by rank 0. timeout_minutes: time-out of
        collectives.
        """
        super().__init__(timeout=timedelta(minutes=timeout_minutes))
        if min(replicas, context) < 1:
            raise ValueError(f"replicas and context are at least 1 (got {replicas} and {context}).")
        if checkpoint not in ("file", "folder"):
            raise ValueError(f"checkpoint is file or folder (got {checkpoint!r}).")
        self.replicas, self.context, self.offload = replicas, context, offload
        self.gather_16, self.sync_each_micro, self.in_folders = gather_16, sync_each_micro, checkpoint == "folder"
        self._shards: DeviceMesh | None = None
        self._source: tuple[Path, dict[KeyPath, Tensor]] = Path(), {}

    # ------------------------------------------------------------ ranks

    def setup_environment(self) -> None:
        world = self.num_nodes * self.num_processes
        if world % (self.replicas * self.context):
            raise ConfigError(
                f"{world} ranks cannot be {self.replicas} replicas of shards in groups of context {self.context}: "
                "trainer.devices × trainer.num_nodes must be a multiple of trainer.strategy.replicas × "
                "trainer.strategy.context."
            )
        self._data_parallel_size, self._tensor_parallel_size = world, 1  # Lightning's "auto" is tensor parallelism
        if self.offload and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # the norm of offloaded gradients is reduced on the CPU
        super().setup_environment()
        if self._shards is None:
            shape, names = (self.replicas, world // self.replicas), ("replicate", "shard")
            cut = slice(None) if self.replicas > 1 else slice(1, None)
            self._shards = init_device_mesh(self.root_device.type, shape[cut], mesh_dim_names=names[cut])

    def agree(self, wanted: Tensor) -> Tensor:
        """(n,) bool: whether any rank wants each network; sharded networks must be called by all ranks together."""
        any_rank = wanted.to(self.root_device, torch.uint8)
        dist.all_reduce(any_rank, dist.ReduceOp.MAX)
        return any_rank.bool()

    # ------------------------------------------------------------ shards

    def shard(self, model: FlowModel) -> None:
        """Shard the denoisers of a model that is prepared for training."""
        denoisers = list(model.denoisers().values())
        if len(denoisers) > 1 and not self.sync_each_micro:
            raise ConfigError(
                f"{type(model).__name__} has several denoisers, and the last micro-batch of a step may not use all of "
                "them: use trainer.strategy.sync_each_micro=true."
            )
        if self.context > 1:
            for denoiser in denoisers:
                check_plan(denoiser, self.context)
        assert self._shards is not None
        gather = torch.bfloat16 if self.gather_16 and self.precision_plugin.precision == "bf16-mixed" else None
        for denoiser in denoisers:
            inside = {id(m) for m in denoiser.modules()}
            blocks = [block for block in model.blocks() if id(block) in inside]
            shard(denoiser, blocks, self._shards, self.root_device, gather, self.offload)
        if self.context > 1:
            split_sequences(model, self.context, self.root_device.type)
        model.agree = self.agree

    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        if self.offload:  # offloaded shards must stay on the CPU
            _update_properties(self.lightning_module, device=self.root_device)
        else:
            super().model_to_device()

    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        assert self.lightning_module is not None
        sharded = [m for m in self.lightning_module.modules() if isinstance(m, FSDPModule)]
        if self.sync_each_micro:
            sharded = []
        for module in sharded:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in sharded:
                module.set_requires_gradient_sync(True, recurse=False)

    def backward(self, closure_loss: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        # Ranks that share a sequence hold partial gradients, which must be summed, while FSDP averages over all ranks.
        return super().backward(closure_loss * self.context, *arguments, **settings)

    # ------------------------------------------------------------ saving checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._for_checkpoint(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = inner.state_dict()
        odd = [place[-1] for place, t in split_tensors(state["state"])[1].items() if not isinstance(t, DTensor)]
        if odd:
            raise ConfigError(
                f"{type(inner).__name__} stores {odd[0]} in a form that cannot be gathered from shards: use "
                "optimizer._target_=torch.optim.AdamW."
            )
        return self._for_checkpoint(state)

    def _for_checkpoint(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state as it is for a folder; gathered on rank 0, and empty elsewhere, for a file."""
        return state if self.in_folders else gather_to_cpu(state, self.is_global_zero) or {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        path = Path(self.broadcast(str(filepath)))
        if self.in_folders:
            folders.write(checkpoint, path, self.is_global_zero)
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)

    # ------------------------------------------------------------ loading checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """The frame that rank 0 reads; the module's and the optimiser's tensors are read by their own load calls."""
        del weights_only  # always
        frame, tensors = None, {}
        if self.is_global_zero:
            try:
                frame, tensors = folders.read_split(Path(checkpoint_path))
            except Exception as error:  # raise it on all ranks, which would otherwise wait for the broadcast
                frame = error
        frame = self.broadcast(frame)
        if isinstance(frame, Exception):
            raise frame
        assert frame is not None
        self._source = Path(self.broadcast(str(checkpoint_path))), tensors
        return frame

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        own, state = module.state_dict(), checkpoint["state_dict"]
        if own.keys() == state.keys() and all(own[key].shape == t.shape for key, t in state.items()):
            state = self._read(state, own, ("state_dict",))
        module.load_state_dict(state, strict)  # raises its own error for keys and shapes that do not match

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for i, (optimizer, saved) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            targets = {
                number: {name: torch.empty_like(params[number], dtype=t.dtype) for name, t in values.items() if t.ndim}
                for number, values in saved["state"].items()
            }
            state = self._read(saved["state"], targets, ("optimizer_states", i, "state"))
            optimizer.load_state_dict({**saved, "state": state})

    def _read(self, frame: Any, targets: Any, at: KeyPath) -> Any:
        """`frame` with its meta tensors read into the layout of `targets`, which holds one target for each."""
        path, tensors = self._source
        wanted, metas = split_tensors(targets, at)[1], split_tensors(frame, at)[1]
        if folders.is_folder(path):
            folders.read_into(path, wanted)
        else:
            wanted = {place: like(tensors.get(place, metas[place]), target) for place, target in wanted.items()}
        return join_tensors(frame, wanted, at)
