"""Delta gradient descent: each linear layer is an exact proximal step away from what it was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nl_models.optim.layer_inputs import InputRecorder
from nl_models.optim.mixed_optimizer import Group, MixedOptimizer, state_dtype

REDUCTIONS = ("mean", "sum")


class DeltaGradientDescent(MixedOptimizer):
    """Gradient descent that unlearns what a layer says to its inputs (arXiv 2512.24695, Eqs. 56–57).

    For the weight W [out, in] of an ``nn.Linear`` with inputs X [N, in] (rows, over all uses of the layer and
    all backward passes since ``zero_grad``) and gradient G = ∂L/∂W, exactly::

        W ← (W − lr·G) (I + c XᵀX)⁻¹,    c = lr·erase / N with reduction="mean",  lr·erase with "sum"

    which for a loss summed over rows (``reduction="sum"``, ``erase=1``) is the minimum over V of
    ``½ Σ ‖V x − u‖² + ‖V − W‖² / (2 lr)`` with u the negative gradient of each output; ``"mean"`` is the same
    for a mean loss. The solve is of N × N or in × in, whichever is smaller. Weight decay comes first.
    Parameters in groups with ``rule="adamw"`` follow AdamW; :meth:`describe` says which.

    Hooks on the layers collect the inputs, until :meth:`remove_hooks`. Forward passes without a backward pass
    leave nothing; evaluation, repeated layers, gradient accumulation, clipping, scaling, autocast and
    activation checkpointing give the exact step. Call this object's ``zero_grad`` between steps. Not
    supported, with an error that says so: a compiled model, weights shared with other kinds of modules,
    ``DistributedDataParallel`` and sharded parameters (the inputs of other processes would be missing). A
    weight that is used by hand beside its layer is not noticed.

    Args:
        params: groups of ``split_parameters(model, linear_only=True)``, or any parameters or groups as
            PyTorch takes them; a group's ``"rule"`` is ``"matrix"`` if absent.
        lr: of the layers: as SGD's.
        model: where the layers are.
        erase: strength of the unlearning, at least 0; 0 is SGD.
        reduction: of the loss over the rows: ``"mean"`` or ``"sum"``.
        weight_decay: decoupled, of both rules.
        adamw_lr, adamw_betas, adamw_eps: of AdamW's rule.

    State: none of the layers. From a backward pass to ``zero_grad`` min(N, in) · in numbers a layer, fp32
    (fp64 for fp64).

    Raises:
        TypeError: ``model`` is no module.
        ValueError: an option out of range, or a matrix that is no weight of an ``nn.Linear`` of ``model``.
    """

    needs_inputs = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        *,
        model: nn.Module,
        erase: float = 1.0,
        reduction: str = "mean",
        weight_decay: float = 0.0,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        modules = list(model.modules())
        if any(isinstance(module, DistributedDataParallel) for module in modules):
            raise ValueError("model: DistributedDataParallel is not supported: inputs stay in their process")
        self._layers = [module for module in modules if isinstance(module, nn.Linear)]
        self._others = {
            p for m in modules if not isinstance(m, nn.Linear) for p in m.parameters(recurse=False)
        }
        self._recorder = InputRecorder()
        defaults = {
            "lr": lr,
            "erase": erase,
            "reduction": reduction,
            "weight_decay": weight_decay,
            "adamw_lr": adamw_lr,
            "adamw_betas": tuple(adamw_betas),
            "adamw_eps": adamw_eps,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group and hooks for its layers; nothing has changed if it is refused.

        Raises:
            ValueError: an option out of range, or a matrix that is no weight of an ``nn.Linear`` alone.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["rule"] == "matrix":
            weights = set(group["params"])
            for layer in self._layers:
                if layer.weight in weights:
                    self._recorder.watch(layer)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients and the inputs that belong to them."""
        super().zero_grad(set_to_none)
        self._recorder.clear()

    def remove_hooks(self) -> None:
        """Leave the model as it was; steps are refused from now on."""
        self._recorder.remove()

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "DeltaGradientDescent: its hooks belong to one model, so it cannot be copied or pickled; make "
            "another one and load the state_dict"
        )

    def _check_gradients(self, work: list[tuple[Group, list[torch.Tensor]]]) -> None:
        super()._check_gradients(work)
        for group, params in work:
            for p in params:
                if group["rule"] == "matrix" and group["lr"] and self._recorder.of(p) is None:
                    raise RuntimeError(
                        f"DeltaGradientDescent: the inputs behind the gradient of {self._name_of(group, p)} "
                        "are not known. It must come from backward passes through its nn.Linear, after this "
                        "object was made and before remove_hooks(), and must not be replaced; a weight that "
                        "is used in another way belongs to a group with rule='adamw'"
                    )

    def _matrix_step(self, matrices: list[tuple[Group, list[torch.Tensor]]]) -> None:
        for group, params in matrices:
            if not group["lr"]:
                continue  # W stays W, whatever the inputs: distributed checkpointing makes such a step
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            alike: dict[tuple, list[torch.Tensor]] = {}
            for p in params:
                inputs = self._recorder.of(p)
                rows = None if inputs.rows is None else inputs.count
                alike.setdefault((p.shape, p.dtype, p.device, rows), []).append(p)
            for (_, dtype, _, _), members in alike.items():
                new = self._stepped(group, torch.stack(members).to(state_dtype(members[0])), members)
                torch._foreach_copy_(members, list(new.to(dtype).unbind()))

    def _stepped(self, group: Group, weights: torch.Tensor, members: list[torch.Tensor]) -> torch.Tensor:
        """The new weights [k, out, in] of layers of one shape, by one solve."""
        weights = weights - group["lr"] * torch.stack([p.grad for p in members]).to(weights.dtype)
        collected = [self._recorder.of(p) for p in members]
        strength = group["lr"] * group["erase"]
        rates = [strength / i.count if group["reduction"] == "mean" else strength for i in collected]
        if collected[0].gram is not None:
            system = torch.stack([rate * i.gram for rate, i in zip(rates, collected)])
            return torch.cholesky_solve(weights.mT, _factor(system)).mT
        rows = torch.stack([i.rows for i in collected])  # as many of each: that is what makes them alike
        answers = torch.cholesky_solve(rows, _factor(rates[0] * (rows @ rows.mT)))
        return weights - rates[0] * (weights @ rows.mT) @ answers

    def _check_group(self, group: Group) -> None:
        if not 0 <= group["erase"] < float("inf"):
            raise ValueError(f"erase: expected a number of at least 0, got {group['erase']!r}")
        if group["reduction"] not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {group['reduction']!r}")
        super()._check_group(group)
        own = {layer.weight for layer in self._layers} - self._others
        for p in group["params"]:
            if group["rule"] == "matrix" and p not in own:
                raise ValueError(
                    f"params: {self._name_of(group, p)} of shape {tuple(p.shape)} is not the weight of an "
                    "nn.Linear of the model, or of other modules too; put it in a group with rule='adamw': "
                    "split_parameters(model, linear_only=True)"
                )


def _factor(system: torch.Tensor) -> torch.Tensor:
    """Cholesky factor of I + ``system``; without the check for errors, which would wait for the device."""
    system.diagonal(dim1=-2, dim2=-1).add_(1)
    return torch.linalg.cholesky_ex(system)[0]
