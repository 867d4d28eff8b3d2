"""Reading a stream: predict a piece, then let every level whose chunk is full take its step.

Pure functions of a :class:`StreamState`, first order or with the graph of every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from nl_kernels import continuum_update
from nl_models.continual.fast_parameters import Context, FastParameter, FastParameters
from nl_models.continual.rules import StepRule

Tensors = dict[str, torch.Tensor]

GROUPS = ("changes", "gradients", "grams", "momenta")
"""What of a state is learned: tensors by name, with the streams as their first dimension."""


@dataclass(frozen=True)
class StreamState:
    """All that is carried along B streams, which run side by side. Nothing in it is changed in place.

    A stream is learned from in pieces, each of which ends where the fastest level's chunk, or the context
    ends. One that is not full yet waits, so that a stream may be cut anywhere.

    Attributes:
        changes: by name of a fast parameter, what is added to the model's weight, ``[B, out, in]``.
        gradients: of the tokens since the level's last step, where there are any.
        grams: Σ x xᵀ of their inputs ``[B, in, in]``, by level and input name (``dgd``).
        momenta: of the rules that have one, from the first step on.
        learned: tokens learned from so far. Level ℓ has stepped ``learned // chunk_size`` times.
        read: tokens of the stream taken in, the first of every context and those that wait too.
        documents: contexts begun.
        context: the model's, before the piece that waits.
        context_tokens: how many tokens it has seen.
        waiting: ``[B, 1 + P]``, the token before the piece, and the P tokens of it that were read; ``None``
            before the first of a context.
    """

    changes: Tensors
    gradients: Tensors = field(default_factory=dict)
    grams: Tensors = field(default_factory=dict)
    momenta: Tensors = field(default_factory=dict)
    learned: int = 0
    read: int = 0
    documents: int = 0
    context: Context = None
    context_tokens: int = 0
    waiting: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> StreamState:
        """``function`` of every tensor that is learned; the context stays."""
        groups: dict[str, Any] = {
            name: {n: function(t) for n, t in getattr(self, name).items()} for name in GROUPS
        }
        return replace(self, **groups)

    def select(self, rows: torch.Tensor) -> StreamState:
        """The streams ``rows [N]`` alone."""
        chosen = self.map(lambda t: t.index_select(0, rows.to(t.device)))
        waiting = self.waiting
        return replace(
            chosen,
            context=None if self.context is None else self.context.select(rows),
            waiting=None if waiting is None else waiting.index_select(0, rows.to(waiting.device)),
        )

    @staticmethod
    def join(states: Sequence[StreamState]) -> StreamState:
        """The streams of several states side by side, which stand at the same place in every chunk."""
        first, groups = states[0], {}
        for group in GROUPS:
            names = dict.fromkeys(name for state in states for name in getattr(state, group))
            groups[group] = {
                # A momentum that there is not yet is zero.
                name: torch.cat(
                    [getattr(s, group).get(name, torch.zeros_like(s.changes[name])) for s in states]
                )
                if group == "momenta"
                else torch.cat([getattr(state, group)[name] for state in states])
                for name in names
            }
        context, waiting = first.context, first.waiting
        return replace(
            first,
            **groups,
            context=None if context is None else type(context).join([state.context for state in states]),
            waiting=None if waiting is None else torch.cat([state.waiting for state in states]),
        )


class Piece(NamedTuple):
    """What reading some tokens of every stream did.

    Attributes:
        loss: ``[B]``, nats summed over the tokens, predicted before they were learned.
        tokens: how many.
        steps: the levels that stepped after them, and how far: mean over the batch of ‖ΔW‖ / ‖W‖, a scalar
            on the device, for which nothing waits.
    """

    loss: torch.Tensor
    tokens: int
    steps: dict[int, torch.Tensor]


def begin_context(
    model: FastParameters, rules: Sequence[StepRule], state: StreamState, *, create_graph: bool = False
) -> StreamState:
    """The state before the first token of another document: nothing of the text, all that was learned."""
    if state.waiting is not None and state.waiting.shape[1] > 1:
        state, _, _ = _learn(model, rules, state, create_graph)
    return replace(state, context=None, context_tokens=0, waiting=None, documents=state.documents + 1)


def advance(
    model: FastParameters,
    rules: Sequence[StepRule],
    state: StreamState,
    tokens: torch.Tensor,
    *,
    context_length: int | None,
    create_graph: bool = False,
) -> Iterator[tuple[StreamState, Piece | None]]:
    """Read ``tokens [B, T]`` piece by piece: the state after each, and what happened.

    Every level's gradient is that of the summed next-token loss of its chunk at the weights that served the
    tokens (Eq. 71); what the context holds of earlier pieces is a constant in it. With ``create_graph`` the
    result is the same, and the graph of every step is kept.
    """
    while tokens.shape[1]:
        if state.waiting is None:
            state = replace(state, waiting=tokens[:, :1], read=state.read + 1)
            tokens = tokens[:, 1:]
            yield state, None
            continue
        if context_length is not None and state.context_tokens == context_length:
            state = replace(state, context=None, context_tokens=0)
        fastest = model.chunk_sizes[0]
        length = fastest - state.learned % fastest
        if context_length is not None:
            length = min(length, context_length - state.context_tokens)
        waited = state.waiting.shape[1] - 1
        new, tokens = tokens.tensor_split([length - waited], dim=1)
        count = new.shape[1]
        state = replace(state, waiting=torch.cat([state.waiting, new], dim=1), read=state.read + count)
        sizes: dict[int, torch.Tensor] = {}
        if waited + count == length:
            state, losses, sizes = _learn(model, rules, state, create_graph)
        else:
            with torch.set_grad_enabled(create_graph):
                output = model.run(state.changes, state.waiting[:, :-1], state.context)
                losses = token_losses(output.logits, state.waiting[:, 1:])
        yield state, Piece(losses[:, waited:].sum(1), count, sizes)


def _learn(
    model: FastParameters, rules: Sequence[StepRule], state: StreamState, create_graph: bool
) -> tuple[StreamState, torch.Tensor, dict[int, torch.Tensor]]:
    """Learn from the piece that waits: the state after it, its losses ``[B, P]``, the steps that followed."""
    inputs, targets = state.waiting[:, :-1], state.waiting[:, 1:]
    learning = [parameter for parameter in model.parameters if rules[parameter.level].steps]
    # Fresh tensors for every piece: the context of earlier ones leads back to others, whose part in this
    # piece's loss is thereby left out of the step, with and without a graph.
    served = {
        name: change.clone() if create_graph and change.requires_grad else change.detach().requires_grad_()
        for name, change in state.changes.items()
    }
    with torch.set_grad_enabled(create_graph or bool(learning)):
        keep_inputs = any(rule.rule == "dgd" for rule in rules)
        output = model.run(served, inputs, state.context, keep_inputs=keep_inputs)
        losses = token_losses(output.logits, targets)
        found: tuple[torch.Tensor, ...] = ()
        if learning:
            leaves = [served[parameter.name] for parameter in learning]
            found = torch.autograd.grad(losses.sum(), leaves, create_graph=create_graph)
    gradients = dict(state.gradients)
    for parameter, gradient in zip(learning, found, strict=True):
        _accumulate(gradients, parameter.name, gradient)
    grams = dict(state.grams)
    erasing = {gram_name(p): p.input_name for p in learning if rules[p.level].rule == "dgd"}
    for name, input_name in erasing.items():
        x = output.inputs[input_name] if create_graph else output.inputs[input_name].detach()
        _accumulate(grams, name, x.mT @ x)
    count = targets.shape[1]
    state = replace(
        state,
        gradients=gradients,
        grams=grams,
        learned=state.learned + count,
        context=output.context if create_graph else model.detach(output.context),
        context_tokens=state.context_tokens + count,
        waiting=targets[:, -1:],
    )
    sizes = {}
    for level, (chunk_size, rule) in enumerate(zip(model.chunk_sizes, rules, strict=True)):
        if state.learned % chunk_size:
            continue
        if rule.steps:
            state, sizes[level] = step_level(model, rule, state, level, create_graph=create_graph)
        if model.nested:
            # A level with rate 0 has its chunks too: those below start over, and nothing stays of them.
            state = _reset_faster(model, state, level)
    return state, losses if create_graph else losses.detach(), sizes


def step_level(
    model: FastParameters, rule: StepRule, state: StreamState, level: int, *, create_graph: bool
) -> tuple[StreamState, torch.Tensor]:
    """The state after one step of ``level``, and its size: mean over the batch of ‖ΔW‖ / ‖W‖."""
    changes, gradients, momenta = dict(state.changes), dict(state.gradients), dict(state.momenta)
    grams = {name: gram for name, gram in state.grams.items() if not name.startswith(f"{level}/")}
    squares = torch.zeros((), dtype=model.dtype, device=model.device)
    for parameter in model.parameters:
        if parameter.level != level:
            continue
        before, gradient = changes[parameter.name], rule.rates() * gradients.pop(parameter.name)
        options = {}
        if rule.has_momentum:
            options = {
                "momentum": momenta.get(parameter.name),
                "momentum_decay": rule.momentum_decay,
            }
        # A step that does not read the weight is the same on the change alone, and loses no digits there.
        initial = torch.zeros((), dtype=before.dtype, device=before.device)
        if rule.reads_weight:
            initial = model.weight(parameter)
            initial = initial if create_graph else initial.detach()
        if rule.rule == "dgd":
            options["gram"] = rule.rates() * state.grams[gram_name(parameter)]
        if rule.retention < 1:
            options |= {"initial": initial.expand_as(before), "retention": rule.retention}
        if rule.restore_norms:
            options["norms"] = torch.linalg.vector_norm(initial, dim=-1)
        new, momentum = continuum_update(initial + before, gradient, rule=rule.rule, **options)
        changes[parameter.name] = (new - initial).contiguous()
        if momentum is not None:
            momenta[parameter.name] = momentum.contiguous()
        squares = squares + (changes[parameter.name] - before).detach().square().sum((1, 2))
    size = squares.sqrt().mean() / model.level_norms[level]
    return replace(state, changes=changes, gradients=gradients, grams=grams, momenta=momenta), size


def _reset_faster(model: FastParameters, state: StreamState, level: int) -> StreamState:
    faster = {parameter.name for parameter in model.parameters if parameter.level < level}
    return replace(
        state,
        changes={n: torch.zeros_like(t) if n in faster else t for n, t in state.changes.items()},
        momenta={n: t for n, t in state.momenta.items() if n not in faster},
    )


def gram_name(parameter: FastParameter) -> str:
    """The name of the sum of outer products that a matrix's inputs have had since its level's last step."""
    return f"{parameter.level}/{parameter.input_name}"


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats ``[B, T]`` of ``targets [B, T]``, in fp32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def _accumulate(sums: Tensors, name: str, addition: torch.Tensor) -> None:
    # In one layout, as after a load: products of other layouts round otherwise.
    addition = addition.contiguous()
    sums[name] = sums[name] + addition if name in sums else addition
