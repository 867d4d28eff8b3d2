"""What linear layers were given in the forward passes that the present gradients come from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from nl_kernels.dispatch import without_autocast
from nl_models.optim.mixed_optimizer import state_dtype


@dataclass
class Inputs:
    """Of one weight [out, in]: rows [N, in] while they are fewer than ``in``, then their product [in, in]."""

    count: int = 0
    rows: torch.Tensor | None = None
    gram: torch.Tensor | None = None
    # The gradient they belong to, as autograd left it.
    gradient: torch.Tensor | None = None
    version: int = -1
    # What the running backward pass has met, by its number, before it has reached the weight.
    waiting: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def add(self, new: torch.Tensor) -> None:
        """Take in rows [N, in]."""
        self.count += new.shape[0]
        if self.gram is None:
            self.rows = new if self.rows is None else torch.cat([self.rows, new])
            if self.count < new.shape[1]:
                return
            new, self.rows = self.rows, None
            self.gram = new.mT @ new
        else:
            self.gram.addmm_(new.mT, new)


class InputRecorder:
    """Collects the inputs of ``nn.Linear`` layers, for weights of its own choice, as gradients are made.

    A layer's input is taken in when a backward pass comes through its output, and counts once that pass has
    added to the weight's gradient. So forward passes without a backward pass leave nothing, a layer may be
    used several times, and under activation checkpointing the input is that of the recomputation.
    """

    def __init__(self) -> None:
        self._inputs: dict[torch.Tensor, Inputs] = {}
        self._handles: list = []

    def watch(self, layer: nn.Linear) -> None:
        """Record a layer from now on."""
        weight = layer.weight
        self._handles.append(layer.register_forward_hook(self._forward, with_kwargs=True))
        if weight not in self._inputs:  # tied layers have one
            self._inputs[weight] = Inputs()
            self._handles.append(weight.register_post_accumulate_grad_hook(self._accumulated))

    def remove(self) -> None:
        """Take away all hooks and what they have collected."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()

    def clear(self) -> None:
        """Forget the inputs of all gradients so far."""
        for weight in self._inputs:
            self._inputs[weight] = Inputs()

    def of(self, weight: torch.Tensor) -> Inputs | None:
        """The inputs behind ``weight.grad``; None if that is not what backward passes through layers left."""
        inputs = self._inputs.get(weight)
        if inputs is None or inputs.count == 0 or inputs.gradient is not weight.grad:
            return None
        return inputs

    def _forward(
        self, layer: nn.Linear, given: tuple, named: dict[str, torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor | None:
        if not (torch.is_grad_enabled() and layer.weight.requires_grad):
            return None
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "DeltaGradientDescent: inputs cannot be collected in a compiled model; compile the "
                "optimiser's step only, or give the compiled part to AdamW"
            )
        return _Tap.apply(output, (*given, *named.values())[0].detach(), layer.weight, self)

    def met(self, weight: torch.Tensor, given: torch.Tensor) -> None:
        """A backward pass has reached the output that the layer made of ``given``."""
        if weight in self._inputs:
            rows = given.reshape(-1, given.shape[-1]).to(state_dtype(weight))
            self._inputs[weight].waiting.append((torch._C._current_graph_task_id(), rows))

    def _accumulated(self, weight: torch.Tensor) -> None:
        inputs, gradient = self._inputs[weight], weight.grad
        task, waiting = torch._C._current_graph_task_id(), inputs.waiting
        if inputs.gradient is not gradient:  # a new gradient, not a sum with the last one
            inputs = self._inputs[weight] = Inputs()
        elif gradient._version != inputs.version + 1:
            raise RuntimeError(
                f"DeltaGradientDescent: a gradient of shape {tuple(weight.shape)} was changed between two "
                "backward passes; call the optimiser's zero_grad() before the first, and clip after the last"
            )
        with without_autocast(weight.device.type):
            for number, rows in waiting:
                if number == task:  # others asked for gradients of other things
                    inputs.add(rows)
        inputs.waiting = []
        inputs.gradient, inputs.version = gradient, gradient._version


class _Tap(torch.autograd.Function):
    """The output as it is. The input is kept as autograd keeps it, so checkpointing can drop it."""

    @staticmethod
    def forward(ctx, output, given, weight, recorder):
        ctx.mark_dirty(output)
        ctx.save_for_backward(given)
        ctx.weight, ctx.recorder = weight, recorder
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (given,) = ctx.saved_tensors
        ctx.recorder.met(ctx.weight, given)
        return grad, None, None, None
