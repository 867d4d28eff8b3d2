"""How the ranks of a training share its work."""

from __future__ import annotations

import contextlib
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from nl_models.parallel.heads import parallelize_heads
from nl_models.parallel.model import SequenceParallel


@dataclass(frozen=True)
class Mesh:
    """Ranks that share a batch's windows (``data``), each window (``sequence``), a mixer's heads (``heads``).

    The rank of the last dimension runs fastest, so that those that send most lie beside each other.

    Raises:
        ValueError: a dimension below 1.
    """

    data: int = 1
    sequence: int = 1
    heads: int = 1

    def __post_init__(self) -> None:
        if min(self.data, self.sequence, self.heads) < 1:
            raise ValueError(f"mesh: expected numbers of ranks from 1, got {self}")

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """``"data=8,sequence=4"``; what is absent is 1.

        Raises:
            ValueError: another form, or a dimension twice.
        """
        parts = re.findall(r"(data|sequence|heads)=(\d+)", text)
        if ",".join(map("=".join, parts)) != text or len(dict(parts)) < len(parts) or not parts:
            raise ValueError(f"mesh: expected such as data=8,sequence=4 or data=4,heads=2, got {text!r}")
        return cls(**{name: int(size) for name, size in parts})

    @property
    def ranks(self) -> int:
        return self.data * self.sequence * self.heads

    def place(self, rank: int) -> int:
        """Which of the ``data`` shares a rank has."""
        return rank // (self.sequence * self.heads)

    def __str__(self) -> str:
        heads = f",heads={self.heads}" if self.heads != 1 else ""
        return f"data={self.data},sequence={self.sequence}{heads}"


def parts_in_turn(windows: int, ranks: int) -> int:
    """Into how many parts ranks that share windows cut a batch, which they work on in turn.

    With as many parts as ranks they wait for less than one part in L + 1 of a step of L blocks
    (:func:`~nl_models.parallel.plan.idle_share`); more parts would make smaller products for little.
    """
    return min(windows, ranks)


class ParallelModel:
    """A model that the processes train together; each calls it with its own windows.

    Args:
        model: the same on all of them; changed in place where weights or heads are shared out.
        mesh: how they share the work; of as many ranks as there are processes.
        fsdp: whether they share the weights, too (FSDP2).
    """

    def __init__(self, model: nn.Module, device: torch.device, mesh: Mesh, *, fsdp: bool) -> None:
        self._model = self._called = model
        self._average = None  # the ranks whose gradients are averaged, where DDP or FSDP2 does not do it
        if not (dist.is_available() and dist.is_initialized()):
            return
        sizes, names = (mesh.data, mesh.sequence, mesh.heads), ("data", "sequence", "heads")
        ranks = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        if fsdp:
            shard_blocks(model, ranks["data"])
        elif mesh.sequence > 1:
            self._called, self._average = SequenceParallel(model, ranks["sequence"]), ranks["data"]
        elif mesh.heads > 1:
            self._called, self._average = parallelize_heads(model, ranks["heads"]), ranks["data"]
        elif mesh.data > 1:
            self._called = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        """The loss of these windows, or of this rank's piece of them, as the model's ``forward`` has it."""
        if isinstance(self._called, SequenceParallel):
            ranks = self._called.ranks
            self._called.micro_batches = parts_in_turn(len(input_ids), ranks.size)
            input_ids, labels = (x.chunk(ranks.size, 1)[ranks.rank] for x in (input_ids, labels))
        else:
            options["use_cache"] = "cache" in options
        return self._called(input_ids=input_ids, labels=labels, **options).loss

    def exchanged(self) -> tuple[int, float]:
        """Bytes of states that this rank has sent to others of its windows, and seconds waited for them."""
        if not isinstance(self._called, SequenceParallel):
            return 0, 0.0
        return self._called.ranks.sent.total(), self._called.ranks.waited

    def without_exchange(self) -> contextlib.AbstractContextManager:
        """For all but the last pass of a step: DDP keeps the gradients of a pass here."""
        is_ddp = isinstance(self._called, DistributedDataParallel)
        return self._called.no_sync() if is_ddp else contextlib.nullcontext()

    def exchange_gradients(self) -> None:
        """After the last pass of a step: on all ranks the mean over ``data`` of the sum over ``sequence``."""
        if self._average is None:
            return
        if isinstance(self._called, SequenceParallel):
            self._called.reduce_gradients()
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                gradient = parameter.grad
                local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                dist.all_reduce(local, group=self._average.get_group())
                local /= self._average.size()


def shard_blocks(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard the model in place (FSDP2) and return it.

    A block is gathered at a time: what ``gradient_checkpointing_enable`` takes for one.
    """
    from torch.distributed.fsdp import fully_shard

    # Nothing here works in place on what a block returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)
    return model
