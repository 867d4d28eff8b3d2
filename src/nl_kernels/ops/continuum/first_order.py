"""The gradient of what is read, with steps as constants: levels' chunks as one node.

A step is a constant that is added to the weights, so the gradient of the weights after it is that of the
weights before it: all chunks add to one gradient, of the weights that they came from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nl_kernels.dispatch import without_autocast
from nl_kernels.ops.continuum.chunk_walk import LevelCall, Recorded, contiguous, take, walk
from nl_kernels.ops.continuum.schedule import Owner
from nl_kernels.ops.continuum.state import NO_MOMENTA, Weights, initial_weights, state_dtype

_INPUTS = 7  # of each call: reads, its weights, the weights that resets go back to


def walk_recorded(
    calls: Sequence[LevelCall],
    reads: Sequence[torch.Tensor],
    states: Sequence[tuple[Weights, Weights]],
    keep_state: bool,
) -> list[tuple[torch.Tensor, Weights, Weights]]:
    """Of each call the outputs [B, L, D], and with ``keep_state`` the last weights and momenta."""
    tensors = []
    for call, part, (weights, _) in zip(calls, reads, states):
        start = NO_MOMENTA if call.resets is None else initial_weights(call.level)
        tensors += [part, *weights, *start]
    momenta = [each for _, each in states]
    results = iter(_FirstOrder.apply(calls, momenta, keep_state, *tensors))
    return [(next(results), *(Weights(*(next(results) for _ in range(3))) for _ in range(2))) for _ in calls]


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, calls, momenta, keep_state, *tensors):
        walks = [
            call.walk(Weights(*tensors[i + 1 : i + 4]), before, True)
            for i, call, before in zip(range(0, len(tensors), _INPUTS), calls, momenta)
        ]
        take(walk(walks, tensors[::_INPUTS]), calls[0].products)
        # saved, not hung on the node: whoever checkpoints this call drops them
        saved = [t for each in walks for of in each.recorded for t in (*(of.weights or ()), *of.activations)]
        ctx.save_for_backward(*tensors, *saved)
        ctx.walks = [
            (
                call._replace(chunks=()),
                each.owner,
                [(of.weights is not None, of.owner, len(of.activations)) for of in each.recorded],
            )
            for each, call in zip(walks, calls)
        ]
        results = []
        for each in walks:
            results.append(torch.cat(each.outputs, dim=1))
            for last in (each.weights, each.momenta):
                # the node must not keep, nor hand on, its own outputs and inputs
                results += [w.clone() if keep_state and w is not None else None for w in last]
            ctx.mark_non_differentiable(*(m for m in results[-3:] if m is not None))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        tensors = ctx.saved_tensors
        saved = iter(tensors[len(ctx.walks) * _INPUTS :])
        results = []
        for i, (call, last_owner, layout) in enumerate(ctx.walks):
            own = slice(i * _INPUTS, (i + 1) * _INPUTS)
            recorded = [
                Recorded(
                    Weights(*(next(saved) for _ in range(3))) if stepped else None,
                    owner,
                    [next(saved) for _ in range(activations)],
                )
                for stepped, owner, activations in layout
            ]
            d_y, *d_last = grads[own][:4]
            with without_autocast(tensors[0].device.type):
                results += _through(call, recorded, last_owner, d_y, d_last, tensors[own])
        return None, None, None, *results


def _through(
    call: LevelCall,
    recorded: Sequence[Recorded],
    last_owner: Owner,
    d_y: torch.Tensor | None,
    d_last: Sequence[torch.Tensor | None],
    tensors: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """Gradients of reads, weights and start, from those of the outputs and of the last weights."""
    reads, *matrices = tensors
    totals = [None if w is None else w.new_zeros(w.shape, dtype=state_dtype(w.dtype)) for w in matrices]
    d_reads = None
    if d_y is not None:
        given, start = contiguous(matrices[:3]), contiguous(matrices[3:])
        parts = zip(recorded, call.cut(d_y.to(reads.dtype)), call.cut(reads))
        d_reads = torch.cat(
            [
                call.products.read_backward(
                    d_part,
                    x,
                    of.weights or (start if of.owner is True else given),
                    of.activations,
                    _owners(of.owner, totals),
                )
                for of, d_part, x in parts
            ],
            dim=1,
        )
    for share, owned in _owners(last_owner, totals):
        for d_weight, total in zip(d_last, owned):
            if d_weight is not None:
                part = d_weight if share is None else d_weight * share[:, None, None]
                total += part.sum_to_size(total.shape)
    return [d_reads, *(None if t is None else t.to(w.dtype) for t, w in zip(totals, matrices))]


def _owners(owner: Owner, totals: Sequence[torch.Tensor | None]) -> list[tuple]:
    """What gradients of weights are added to, with the sequences' share in it (None: 1)."""
    given, start = totals[:3], totals[3:]
    if isinstance(owner, bool):
        return [(None, start if owner else given)]
    share = owner.to(given[0].dtype)
    return [(1 - share, given), (share, start)]
