"""Which of a model's parameters are hidden matrices."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def split_parameters(
    model: nn.Module,
    *,
    weight_decay: float | None = None,
    exclude: Callable[[str, nn.Parameter], bool] | None = None,
    linear_only: bool = False,
) -> list[dict[str, object]]:
    """Parameter groups for the optimisers of this package, by name: hidden matrices, and the rest for AdamW.

    Matrices are parameters of 2 axes, and of 3, which are stacks of matrices. To AdamW go those of other
    shapes, embeddings and what is tied to them, convolutions, the output head (the model's
    ``get_output_embeddings()``, if it has that method) and what ``exclude`` picks. A model whose head is not
    found so needs ``exclude=lambda name, p: name == "head.weight"``.

    Args:
        weight_decay: of the matrices; AdamW's group then has none. ``None``: the optimiser's own for both.
        exclude: ``(name, parameter) -> bool``: further parameters for AdamW.
        linear_only: of the matrices only weights of ``nn.Linear``, for :class:`DeltaGradientDescent`.
    """
    kinds = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)
    modules = [module for module in model.modules() if isinstance(module, kinds)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    modules += [head] if head is not None else []
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    others = {id(p) for module in modules for p in module.parameters(recurse=False)}
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim in (2, 3) and id(parameter) not in others
            is_matrix = is_matrix and not (exclude is not None and exclude(name, parameter))
            is_matrix = is_matrix and (id(parameter) in linear or not linear_only)
            (matrices if is_matrix else rest).append((name, parameter))
    groups: list[dict[str, object]] = [
        {"params": matrices, "rule": "matrix"},
        {"params": rest, "rule": "adamw"},
    ]
    if weight_decay is not None:
        groups[0]["weight_decay"], groups[1]["weight_decay"] = weight_decay, 0.0
    return [group for group in groups if group["params"]]
