"""What ranks that share sequences send each other: states to later ranks, and their gradients back."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from nl_models.layers.state import State, map_state, state_tensors


@dataclass(frozen=True)
class Agreement:
    """What all ranks know of a call.

    Attributes:
        lengths: tokens of each rank's piece.
        padded: whether any piece has padding.
        resumed: whether the first rank has a state from before its piece.
        others: what else each rank said.
    """

    lengths: tuple[int, ...]
    padded: bool
    resumed: bool
    others: tuple[Any, ...]


class SequenceRanks:
    """The ranks of a group in the order of the pieces that they have of each sequence.

    No rank ever waits for a later one in the forward pass, nor for an earlier one in the backward pass: sends
    do not wait to be received. Messages between two ranks are told apart by their order alone. It is that of
    the calls, which are the same on all ranks, and backward the reverse: autograd runs what was made last.

    Args:
        mesh: of one dimension, for instance ``mesh["sequence"]``. Its process group needs a backend for CPU
            tensors, too, which say what the others are: ``init_process_group("cpu:gloo,cuda:nccl")``.

    Attributes:
        rank, size: this rank's place, and how many there are.
        sent: bytes of tensors that this rank has sent, by layer and pass, ``("Titans", "backward")``.
        waited: seconds for which this process has stood still to receive tensors, sums of gradients included.
            Of NCCL only the wait for what precedes them is seen, since its streams wait by themselves.

    Raises:
        ValueError: a mesh of several dimensions, or a group without a backend for CPU tensors.
    """

    def __init__(self, mesh: DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh: expected one dimension, got {mesh.ndim}; pass that of the sequence, mesh['sequence']"
            )
        self.group = mesh.get_group()
        backends = dist.get_backend_config(self.group)
        if "cpu:" not in backends:
            raise ValueError(
                f"mesh: expected a group with a backend for CPU tensors, got {backends!r}; "
                "call init_process_group('cpu:gloo,cuda:nccl') before making the mesh"
            )
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.sent: Counter[tuple[str, str]] = Counter()
        self.waited = 0.0
        self._sending: list[tuple[dist.Work, torch.Tensor]] = []

    @property
    def is_last(self) -> bool:
        """Whether this rank has the end of each sequence."""
        return self.rank == self.size - 1

    def agree(
        self,
        batch: int,
        length: int,
        padded: bool,
        resumed: bool,
        wrong: str | None = None,
        others: Any = None,
    ) -> Agreement:
        """Tell all ranks what this one was called with, so that errors come on all of them or on none.

        Raises:
            ValueError: ``wrong`` of any rank; batches differ, a piece is empty, or a later rank has a state.
        """
        self.finish()
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, (batch, length, padded, resumed, wrong, others), group=self.group)
        batches, lengths, paddings, states, errors, others = zip(*said)
        for rank, error in enumerate(errors):
            if error is not None:
                raise ValueError(f"{error} (rank {rank})")
        if len(set(batches)) > 1:
            raise ValueError(f"expected pieces of the same sequences, got batches of {batches} by rank")
        if min(lengths) < 1:
            raise ValueError(f"expected a piece of at least one token on each rank, got {lengths}")
        if any(states[1:]):
            raise ValueError(
                "state: expected on the first rank alone, where the sequences begin; "
                f"rank {states.index(True, 1)} has one"
            )
        return Agreement(lengths, any(paddings), states[0], others)

    def send(self, y: torch.Tensor, state: State, to: Sequence[int], name: str) -> torch.Tensor:
        """Send ``state`` to the ranks ``to``. Returns ``y``, whose gradient waits for that of the state."""
        message = bytearray(pickle.dumps(map_state(_without_data, state)))
        for rank in to:
            self._isend(torch.tensor([len(message)]), rank)
            self._isend(torch.frombuffer(message, dtype=torch.uint8), rank)
        return _Send.apply(self, to, name, _anchor(), y, *state_tensors(state))

    def receive(self, x: torch.Tensor, source: int, name: str) -> tuple[torch.Tensor, State]:
        """``x`` and the state from ``source``; the gradient of ``x`` waits until the state's is sent."""
        like = pickle.loads(self._hear(self._hear(8, source).view(torch.int64).item(), source).numpy())
        x, *tensors = _Receive.apply(self, source, name, _anchor(), x, *state_tensors(like))
        received = iter(tensors)
        return x, map_state(lambda _: next(received), like)

    def finish(self) -> None:
        """Wait until all that was sent has been received."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    def report(self) -> str:
        """What this rank has sent and how long it has waited, in lines."""
        rows = [f"{n:14,d} bytes {way:8} {name}" for (name, way), n in sorted(self.sent.items())]
        return "\n".join([f"rank {self.rank} of {self.size}: waited {self.waited:.3f} s", *rows])

    def post(self, tensors: Sequence[torch.Tensor], to: Sequence[int], key: tuple[str, str]) -> None:
        """Send tensors in one message to each of some ranks."""
        if not tensors:
            return
        # Clones, as a single number may have any stride, and then no view of another dtype.
        flat = [t.detach().clone(memory_format=torch.contiguous_format).view(-1) for t in tensors]
        packed = torch.cat([t.view(torch.uint8) for t in flat])
        for rank in to:
            self._isend(packed, rank)
            self.sent[key] += packed.numel()

    def take(self, like: Sequence[torch.Tensor], source: int, device: torch.device) -> list[torch.Tensor]:
        """Receive what :meth:`post` sent, tensors of the shapes and dtypes of ``like``."""
        if not like:
            return []
        sizes = [t.numel() * t.element_size() for t in like]
        packed = self._hear(sum(sizes), source, device)
        # Copies, as a view of another dtype must begin at a multiple of its size.
        return [part.clone().view(t.dtype).view(t.shape) for part, t in zip(packed.split(sizes), like)]

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the block this process waits for others."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def _hear(self, size: int, source: int, device: torch.device | str = "cpu") -> torch.Tensor:
        message = torch.empty(size, dtype=torch.uint8, device=device)
        with self.waiting():
            dist.recv(message, group=self.group, group_src=source)
        return message

    def _isend(self, tensor: torch.Tensor, to: int) -> None:
        # Kept with its memory until the next call. Waiting here would be for the other rank to get there.
        self._sending.append((dist.isend(tensor, group=self.group, group_dst=to), tensor))


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks, to, name, anchor, y, *tensors):
        ctx.ranks, ctx.to, ctx.name = ranks, to, name
        ctx.like = [_without_data(t) for t in tensors]
        ranks.post(tensors, to, (name, "forward"))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        like = [t for t in ctx.like if t.is_floating_point()]
        of_ranks = [ctx.ranks.take(like, rank, dy.device) for rank in ctx.to]
        sums = iter([sum(gradients) for gradients in zip(*of_ranks)])
        return *[None] * 4, dy, *(next(sums) if t.is_floating_point() else None for t in ctx.like)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks, source, name, anchor, x, *like):
        ctx.ranks, ctx.source, ctx.name = ranks, source, name
        tensors = ranks.take(like, source, x.device)
        ctx.mark_non_differentiable(*(t for t in tensors if not t.is_floating_point()))
        ctx.floating = [t.is_floating_point() for t in tensors]
        return x, *tensors

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, *gradients):
        gradients = [g for g, floating in zip(gradients, ctx.floating) if floating]
        ctx.ranks.post(gradients, [ctx.source], (ctx.name, "backward"))
        return *[None] * 4, dx, *[None] * len(ctx.floating)


def _anchor() -> torch.Tensor:
    """With it as an input both ends of a message have a backward pass, even where weights are frozen."""
    return torch.empty(0, requires_grad=torch.is_grad_enabled())


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta", requires_grad=False)
