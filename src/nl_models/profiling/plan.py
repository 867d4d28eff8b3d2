"""What a training step will take, from running it on tensors without data: nothing is computed or allocated.

The step is the real one: the same model, loss, backward pass and optimiser, on PyTorch's fake tensors, which
have shapes and lifetimes only. So the plan of a model of any size needs no GPU and little memory.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nl_kernels.checks import check_choice, check_positive_int
from nl_kernels.dispatch import kernels_planned
from nl_models.hope import HopeConfig, HopeForCausalLM
from nl_models.parallel.heads import parallelize_heads
from nl_models.parallel.mesh import shard_blocks

PRECISIONS = ("fp32", "bf16")
# What a rank sends of each tensor in a ring, for each of its bytes and of the other ranks' share of them.
_SENT = {"_allgather_base_": 1, "_reduce_scatter_base_": 1, "allreduce_": 2, "all_reduce": 2}


class Allocations(TorchDispatchMode):
    """Follows the storages of all tensors that operators make, with or without data.

    Attributes:
        live, peak: bytes now, and the most there were.
        calls: of operators that are no views.
        moved: bytes of the tensors that these take and make.
        gathered: bytes that collectives gather, scatter or, twice, reduce, as on one rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.calls = self.moved = self.gathered = 0
        self._storages: dict[int, weakref.ref] = {}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:  # which calls the same on its shard
            return NotImplemented
        if func.namespace == "nl_kernels":  # what it takes inside, too
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        views = returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if func.namespace in ("c10d", "_c10d_functional"):
            largest = max(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            self.gathered += _SENT.get(func._schema.name.split("::")[1], 0) * largest
        elif not views and func.namespace != "prim":  # which ask for a device
            self.calls += 1
            taken = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.moved += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in taken + made)
        for leaf in made:
            self.follow(leaf)
        return result

    def follow(self, tensor: torch.Tensor) -> None:
        """Count what ``tensor`` lies in, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return

        def freed(_: weakref.ref) -> None:
            del self._storages[key]
            self.live -= self._sizes.pop(key)

        self._storages[key] = weakref.ref(storage, freed)
        self._sizes[key] = 0
        self._resized(storage)

    def counts(self) -> np.ndarray:
        """Calls, bytes moved and bytes gathered so far."""
        return np.array([self.calls, self.moved, self.gathered])

    @contextlib.contextmanager
    def resizes(self) -> Iterator[None]:
        """Follow storages that change their size, too: so FSDP2 frees and refills what it gathers."""
        resize = torch.UntypedStorage.resize_

        def watched(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if storage._cdata in self._storages:
                self._resized(storage)

        with mock.patch.object(torch.UntypedStorage, "resize_", watched):
            yield

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.live += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)


@dataclass(frozen=True)
class Plan:
    """Bytes of one training step on one rank, and the operators that it calls.

    Attributes:
        parameters: weights (fp32) and buffers, or the rank's shards of them.
        gradients: of the weights.
        optimizer: the optimiser's state, AdamW's two moments.
        peak: the most at any time, all of the above included.
        calls: operators that are no views, each a launch on a GPU. A kernel of this package counts for what
            is around it, and the continuum's chunks for eager calls: compiled, they are about a quarter.
        moved: what these operators read and write, each by itself; kernels of this package as above.
        sent: to other ranks, in rings.
    """

    parameters: int
    gradients: int
    optimizer: int
    peak: int
    calls: int
    moved: int
    sent: int

    @property
    def activations(self) -> int:
        """What the peak has beside weights and moments: gradients count, as far as they are made by then."""
        return self.peak - self.parameters - self.optimizer


def plan_training_step(
    config: HopeConfig,
    *,
    batch: int,
    length: int,
    precision: str = "bf16",
    block_checkpoints: bool = False,
    passes: int = 1,
    ranks: int = 1,
    fsdp: bool = False,
    heads: int = 1,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    kernels: bool = True,
) -> Plan:
    """The plan of a step on ``batch`` sequences of ``length`` tokens: forward, backward and the optimiser.

    Blocks of one kind are all alike: of a deep model two and four are run, which gives the rest.

    Args:
        config: of the model.
        batch: of one rank and pass.
        precision: "bf16": fp32 weights and bf16 autocast, as :mod:`nl_models.train` does on CUDA; or "fp32".
        block_checkpoints: activation checkpointing of every block.
        passes: forward and backward passes in a step, which add up their gradients.
        ranks: that have a batch each, of which this is one.
        fsdp: whether they share weights and optimiser (FSDP2), or all have them (DDP).
        heads: that share the heads of each batch; not together with ``fsdp``.
        optimizer: makes the optimiser; AdamW by default.
        kernels: as on CUDA; False: as on the CPU.

    Raises:
        ValueError: a size below 1, another precision, or ranks in a process that is in a group already.
    """
    sizes = {"batch": batch, "length": length, "passes": passes, "ranks": ranks, "heads": heads}
    for name, value in sizes.items():
        check_positive_int(name, value)
    check_choice("precision", precision, PRECISIONS)
    depth = config.num_hidden_layers
    with contextlib.ExitStack() as stack:
        mesh = stack.enter_context(pretended_ranks(heads if heads > 1 else ranks))
        stack.enter_context(FakeTensorMode())
        if kernels:
            stack.enter_context(kernels_planned())
        shared = mesh if fsdp or heads > 1 else None
        step = (batch, length, precision, block_checkpoints, passes, ranks, fsdp, shared, optimizer)
        if depth <= 4 or len(set(config.layer_types)) > 1:
            return follow_training_step(config, *step)
        two, four = (astuple(follow_training_step(of_depth(config, n), *step)) for n in (2, 4))
    return Plan(*(b + (b - a) // 2 * (depth - 4) for a, b in zip(two, four)))


@contextlib.contextmanager
def pretended_ranks(ranks: int) -> Iterator[DeviceMesh | None]:
    """Within the block this process is the first of so many, which send nothing; yields their mesh."""
    if ranks == 1:
        yield None
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    if dist.is_initialized():
        raise ValueError("ranks: expected a process that is in no group; plan without a launcher")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def follow_training_step(
    config: HopeConfig,
    batch: int,
    length: int,
    precision: str,
    block_checkpoints: bool,
    passes: int = 1,
    ranks: int = 1,
    fsdp: bool = False,
    mesh: DeviceMesh | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
) -> Plan:
    """The plan of a step that runs on the tensors made here, which have data unless a mode says otherwise.

    The model is sharded over ``mesh`` with ``fsdp``, else its heads are shared out over it, if it is given.
    """
    model = HopeForCausalLM(config).train()
    if block_checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if mesh is not None:
        (shard_blocks if fsdp else parallelize_heads)(model, mesh)
    ids = torch.zeros(batch, length, dtype=torch.int64)
    made = torch.optim.AdamW(model.parameters(), foreach=False) if optimizer is None else optimizer(model)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with Allocations() as allocations, allocations.resizes():
        for tensor in (ids, *model.parameters(), *model.buffers()):
            allocations.follow(_local(tensor))
        parameters = allocations.live
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        gradients = allocations.live - parameters
        made.step()
        moments = allocations.live - parameters - gradients
        whole = ranks > 1 and mesh is None
        averaged = ranks > 1 and not fsdp
        # DDP's buckets stay and take up gradients. Of several passes only the last one syncs, and fills them.
        buckets = [torch.zeros_like(p) for p in model.parameters()] if whole and passes > 1 else []
        made.zero_grad(set_to_none=passes == 1 and not whole)
        allocations.peak = allocations.live
        before = allocations.counts()
        with autocast:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        del loss
        once = allocations.counts()
        made.step()
        del buckets
        calls, moved, gathered = (int(n) for n in passes * (once - before) + allocations.counts() - once)
        among = ranks if mesh is None else mesh.size()
        sent = gathered * (among - 1) // among + 2 * gradients * averaged * (ranks - 1) // ranks
        return Plan(parameters, gradients, moments, allocations.peak, calls, moved, sent)


def plan_table(plans: Mapping[str, Plan], title: str) -> Table:
    """A row for each plan by its name; memory in GB (10⁹ bytes)."""
    table = Table(box=None, title=title, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    columns = ("parameters", "gradients", "optimizer", "activations", "peak")
    for column in (*columns, "calls"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, plan in plans.items():
        table.add_row(name, *(f"{getattr(plan, c) / 1e9:,.1f}" for c in columns), f"{plan.calls:,}")
    return table


def of_depth(config: HopeConfig, depth: int) -> HopeConfig:
    """The same model with fewer blocks."""
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.layer_types = depth, config.layer_types[:depth]
    return config


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
