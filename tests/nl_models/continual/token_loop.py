"""The definition of a continual learner: one sequence, token by token, on the source model's parameters."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from nl_kernels import newton_schulz
from nl_models.hf_names import CACHE_NAME
from nl_models.surgery.families import FAMILIES


@dataclass(frozen=True)
class Matrix:
    """A block of a parameter that belongs to a level, as ``nn.Linear`` has it."""

    name: str  # of the fast parameter
    level: int
    parameter: str
    rows: slice
    columns: slice
    transposed: bool
    module: str  # whose input it multiplies

    def of(self, weights):
        weight = weights[self.parameter]
        return (weight.T if self.transposed else weight)[self.rows, self.columns]


def read(
    model, matrices, chunk_sizes, rules, tokens, *, context_length=None, new_cache, starts=(), nested=False
):
    """Read ``tokens [T]``; the loss of every token and the final weights by parameter name.

    ``new_cache()`` is an empty cache; a new document begins at each of ``starts``. ``nested``: faster levels
    start over wherever a slower one steps.
    """
    weights = {m.parameter: model.get_parameter(m.parameter).detach().clone() for m in matrices}
    initial = {name: weight.clone() for name, weight in weights.items()}
    sums = {m.name: 0.0 for m in matrices}
    grams = {m.name: 0.0 for m in matrices}
    momenta = {m.name: 0.0 for m in matrices}
    losses, cache, seen, learned = [], new_cache(), 0, 0
    for t in range(len(tokens) - 1):
        if t + 1 in starts:
            cache, seen = new_cache(), 0
            continue  # nothing predicts a document's first token
        if context_length is not None and seen == context_length:
            cache, seen = new_cache(), 0
        if learned % chunk_sizes[0] == 0 or seen == 0:
            # A piece begins: what is behind it is a constant, and its weights are new leaves.
            cut(cache)
            leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        inputs = {}
        hooks = [_keep_input(model, name, inputs) for name in {m.module for m in matrices}]
        options = {"input_ids": tokens[None, t : t + 1], CACHE_NAME: cache, "use_cache": True}
        output = functional_call(model, leaves, kwargs=options)
        for hook in hooks:
            hook.remove()
        cache, seen = output[CACHE_NAME], seen + 1
        loss = F.cross_entropy(output.logits[0, 0], tokens[t + 1])
        losses.append(loss.detach())
        found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)))
        for m in matrices:
            sums[m.name] = sums[m.name] + m.of(found)
            x = inputs[m.module][m.columns]
            grams[m.name] = grams[m.name] + torch.outer(x, x)
        learned += 1
        for level, size in enumerate(chunk_sizes):
            if learned % size == 0:
                for m in matrices:
                    if m.level == level:
                        _step(m, rules[level], weights, initial, sums, grams, momenta)
                        sums[m.name] = grams[m.name] = 0.0
                    elif m.level < level and nested:
                        m.of(weights).copy_(m.of(initial))
                        momenta[m.name] = 0.0
    return torch.stack(losses), weights


def _keep_input(model, name, inputs):
    def keep(module, arguments):
        inputs[name] = arguments[0].detach()[0, 0]

    return model.get_submodule(name).register_forward_pre_hook(keep)


def _step(m, rule, weights, initial, sums, grams, momenta):
    weight = m.of(weights)
    step = rule.rate * sums[m.name]
    if rule.has_momentum:
        momenta[m.name] = step = rule.momentum_decay * momenta[m.name] + step
    if rule.rule == "muon":
        direction = newton_schulz(step, impl="reference")
        step = direction * step.norm() / direction.norm()
    new = weight - step
    if rule.rule == "dgd":
        eye = torch.eye(new.shape[1], dtype=new.dtype)
        kept = m.of(initial) if rule.anchored else 0.0
        new = kept + (new - kept) @ torch.linalg.inv(eye + rule.rate * grams[m.name])
    new = new - (1 - rule.retention) * (weight - m.of(initial))
    if rule.restore_norms:
        new = new * (m.of(initial).norm(dim=1) / new.norm(dim=1))[:, None]
    weight.copy_(new)


def cut(cache):
    for layer in cache.layers:
        for name in ("keys", "values"):
            if getattr(layer, name, None) is not None and math.prod(getattr(layer, name).shape):
                setattr(layer, name, getattr(layer, name).detach())
        if getattr(layer, "state", None) is not None:
            layer.map(torch.Tensor.detach)


def matrices_of_converted(model, units):
    """The blocks of the MLPs' parameters that levels own, in a converted model or in its source."""
    parts_of = FAMILIES[type(model)].backbone_class.mlp_class.parts
    prefix = model.base_model_prefix
    layers = FAMILIES[type(model)].backbone_class.layers_name
    every = slice(None)
    found = []
    for layer in range(model.config.num_hidden_layers):
        for level, own in enumerate(units):
            for part, module in parts_of.items():
                path = f"{prefix}.{layers}.{layer}.mlp.{module}"
                linear = model.get_submodule(path)
                block = slice(own.start, own.stop)
                found.append(
                    Matrix(
                        name=f"layers.{layer}.levels.{level}.{part}",
                        level=level,
                        parameter=f"{path}.weight",
                        rows=every if part == "down" else block,
                        columns=block if part == "down" else every,
                        transposed=not isinstance(linear, nn.Linear),
                        module=path,
                    )
                )
    return found
