"""What a training step will take, from running it on tensors without data: nothing is computed or allocated.

The step is the real one: the same model, loss, backward pass and optimiser, on PyTorch's fake tensors, which
have shapes and lifetimes only. So the plan of a model of any size needs no GPU and little memory.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nl_kernels.checks import check_choice, check_positive_int
from nl_kernels.dispatch import kernels_planned
from nl_models.hope import HopeConfig, HopeForCausalLM

PRECISIONS = ("fp32", "bf16")


class Allocations(TorchDispatchMode):
    """Follows the storages of all tensors that operators make, with or without data.

    Attributes:
        live, peak: bytes now, and the most there were.
        calls: of operators that are no views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.calls = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "nl_kernels":  # what it takes inside, too
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        views = returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        self.calls += not views and func.namespace != "prim"  # which ask for a device
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.follow(leaf)
        return result

    def follow(self, tensor: torch.Tensor) -> None:
        """Count what ``tensor`` lies in, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: weakref.ref) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


@dataclass(frozen=True)
class Plan:
    """Bytes of one training step, and the operators that it calls.

    Attributes:
        parameters: weights (fp32) and buffers.
        gradients: of the weights.
        optimizer: AdamW's two moments.
        peak: the most at any time, all of the above included.
        calls: operators that are no views, each a launch on a GPU. A kernel of this package counts for what
            is around it, and the continuum's chunks for eager calls: compiled, they are about a quarter.
    """

    parameters: int
    gradients: int
    optimizer: int
    peak: int
    calls: int

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
    kernels: bool = True,
) -> Plan:
    """The plan of a step on ``batch`` sequences of ``length`` tokens: forward, backward and AdamW.

    Blocks of one kind are all alike: of a deep model two and four are run, which gives the rest.

    Args:
        config: of the model.
        precision: "bf16": fp32 weights and bf16 autocast, as :mod:`nl_models.train` does on CUDA; or "fp32".
        block_checkpoints: activation checkpointing of every block.
        kernels: as on CUDA; False: as on the CPU.

    Raises:
        ValueError: a size below 1 or another precision.
    """
    for name, value in (("batch", batch), ("length", length)):
        check_positive_int(name, value)
    check_choice("precision", precision, PRECISIONS)
    step = (batch, length, precision, block_checkpoints)
    depth = config.num_hidden_layers
    with FakeTensorMode(), kernels_planned() if kernels else contextlib.nullcontext():
        if depth <= 4 or len(set(config.layer_types)) > 1:
            return follow_training_step(config, *step)
        two, four = (astuple(follow_training_step(_of_depth(config, n), *step)) for n in (2, 4))
    return Plan(*(b + (b - a) // 2 * (depth - 4) for a, b in zip(two, four)))


def follow_training_step(
    config: HopeConfig, batch: int, length: int, precision: str, block_checkpoints: bool
) -> Plan:
    """The plan of a step that runs on the tensors made here, which have data unless a mode says otherwise."""
    model = HopeForCausalLM(config).train()
    if block_checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(batch, length, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with Allocations() as allocations:
        for tensor in (ids, *model.parameters(), *model.buffers()):
            allocations.follow(tensor)
        parameters = allocations.live
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        gradients = allocations.live - parameters
        optimizer.step()
        optimizer.zero_grad()
        moments = allocations.live - parameters
        allocations.peak, allocations.calls = allocations.live, 0
        with autocast:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return Plan(parameters, gradients, moments, allocations.peak, allocations.calls)


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


def _of_depth(config: HopeConfig, depth: int) -> HopeConfig:
    """The same model with fewer blocks."""
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.layer_types = depth, config.layer_types[:depth]
    return config
