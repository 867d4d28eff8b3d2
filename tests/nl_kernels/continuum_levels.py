"""Levels, calls and comparisons for the tests of the continuum memory."""

import dataclasses

import torch

from nl_kernels import ContinuumLevel, continuum_memory
from nl_kernels.memory.segments import Footprint, spans
from nl_kernels.ops.continuum import eager, loop
from nl_kernels.ops.continuum.loop import Options, run_flush, run_memory
from nl_kernels.ops.continuum.state import Weights, state_dtype
from nl_kernels.ops.continuum.update import with_row_norms

WIDTH = 6
TENSORS = ("norm", "up", "down", "gate", "key", "value", "rate", "retention")


def random_tensor(*shape, scale=1.0, shift=0.0, seed):
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def make_level(seed, *, hidden=5, gated=False, rate=0.05, **options):
    s = 10 * seed
    return ContinuumLevel(
        norm=random_tensor(WIDTH, scale=0.1, shift=1.0, seed=s),
        up=random_tensor(hidden, WIDTH, scale=0.4, seed=s + 1),
        down=random_tensor(WIDTH, hidden, scale=0.4, seed=s + 2),
        gate=random_tensor(hidden, WIDTH, scale=0.4, seed=s + 3) if gated else None,
        key=random_tensor(WIDTH, WIDTH, scale=0.4, seed=s + 4),
        value=random_tensor(WIDTH, WIDTH, scale=0.4, seed=s + 5),
        rate=rate if isinstance(rate, (float, torch.Tensor)) else rate(s + 6),
        **options,
    )


def rates(batch, length):
    return lambda seed: torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)).double()


def require_grad(levels):
    """The levels with leaves in the place of their tensors, and the leaves."""
    copies, leaves = [], []
    for level in levels:
        own = {
            name: getattr(level, name).clone().requires_grad_()
            for name in TENSORS
            if isinstance(getattr(level, name), torch.Tensor)
        }
        leaves += own.values()
        copies.append(dataclasses.replace(level, **own))
    return copies, leaves


def flat(state):
    """All tensors of a state but the positions, which are compared by their own."""
    return [
        t for level in state if level is not None for t in level if t is not None and t.is_floating_point()
    ]


def close(found, expected, tolerance=1e-10):
    """Errors at most ``tolerance`` of the largest element of each tensor."""
    assert len(found) == len(expected)
    for f, e in zip(found, expected):
        assert f.shape == e.shape
        if e.numel():
            assert (f - e).abs().max() <= tolerance * max(1.0, e.abs().max().item())


def update_in_place(update):
    """The steps of an ``Update`` in plain PyTorch; nothing is read on the host."""
    weights, gradients, momenta, decay, norms, copies, sources, where, initial, retention = update
    for i, (weight, step) in enumerate(zip(weights, gradients)):
        old = (weight if sources is None else sources[i].to(weight.dtype)).expand_as(weight)
        taken = torch.ones_like(weight[..., :1, :1]) > 0 if where is None else where[i][..., None, None]
        if momenta is not None:
            after = momenta[i] * decay + step
            step = momenta[i].copy_(torch.where(taken, after, momenta[i]))
        new = old - step
        if initial is not None:
            new = new - (1 - retention[i]) * (old - initial[i].to(old.dtype))
        if norms is not None:
            new = with_row_norms(new, norms[i])
        weight.copy_(torch.where(taken, new, old))
        if copies is not None:
            copies[i].copy_(weight)


class ExactProducts:
    """What the kernels make of a chunk, in PyTorch: any machine runs it in any dtype."""

    IMPL, IN_PLACE = "eager", True
    update_in_place = staticmethod(update_in_place)

    @staticmethod
    def read(x, weights, records):
        return eager.mlp(x, *weights), ()

    @staticmethod
    def chunk_sums(level, keys, inputs, weights, rates, reads):
        weights = eager.cast(weights, keys.dtype)
        made = eager.evaluate(keys, weights)
        targets = inputs @ level.value.to(inputs.dtype).mT
        factors = eager.step_factors(level, weights, made, keys, targets, rates)
        sums = (f and f[0].to(rates.dtype).mT @ f[1].to(rates.dtype) for f in factors)
        return made.outputs.down if reads else None, Weights(*sums)

    @staticmethod
    def read_backward(d_y, x, weights, activations, owners):
        _, activations = eager.read(x, eager.cast(weights, x.dtype), True)
        return eager.read_backward(d_y, x, weights, activations, owners)


STEPS = [(False, None), (True, None), (False, 0.3), (True, 0.3)]
"""Whether there is a gate, and the bound of errors."""


def step_arguments(*, gated, batch=2, tokens=5, width=6, hidden=7, dtype=torch.float64, device="cpu"):
    """Tokens of a chunk, their rates and the fast weights of each sequence, for :func:`step_sums`."""
    made = {
        "inputs": random_tensor(batch, tokens, width, seed=0),
        "value": random_tensor(width, width, scale=width**-0.5, seed=4),
        "up": random_tensor(batch, hidden, width, scale=width**-0.5, seed=1),
        "down": random_tensor(batch, width, hidden, scale=hidden**-0.5, seed=2),
        "gate": random_tensor(batch, hidden, width, scale=width**-0.5, seed=3) if gated else None,
    }
    made = {name: None if x is None else x.to(device, dtype) for name, x in made.items()}
    made["rates"] = random_tensor(batch, tokens, seed=5).abs().to(device, state_dtype(dtype))
    return made


def step_sums(made, bound, products):
    """Σ_t η_t δ_t x_tᵀ of up, down and gate, from which the step of a chunk is made."""
    weights = Weights(made["up"], made["down"], made["gate"])
    level = ContinuumLevel(
        norm=None, up=None, down=None, value=made["value"], rate=1.0, chunk_size=1, error_bound=bound
    )
    inputs = made["inputs"]
    _, sums = products.chunk_sums(level, inputs, inputs, weights, made["rates"], False)
    return [part for part in sums if part is not None]


def in_place(
    x, levels, *, impl="eager", detach_updates=True, initial_state=None, output_final_state=False,
    variant="sequential", level_weights=None, mask=None, checkpoint_every=None,
):  # fmt: skip
    """The memory with steps in place, as the kernels take them."""
    assert detach_updates
    assert impl == "eager"
    options = Options(variant, 1e-6, False, ExactProducts, checkpoint_every, output_final_state)
    return run_memory(x, levels, options, level_weights=level_weights, mask=mask, initial_state=initial_state)


def flush_in_place(state, levels, *, variant="sequential"):
    return run_flush(state, levels, Options(variant, 1e-6, False, ExactProducts))


def run_with_gradients(
    x, levels, impl, *, state=None, level_weights=None, memory=continuum_memory, **options
):
    """y, final state and the gradients of a random functional of both, of everything that goes in."""
    x = x.clone().requires_grad_()
    levels, leaves = require_grad(levels)
    if level_weights is not None:
        level_weights = level_weights.clone().requires_grad_()
        leaves.append(level_weights)
        options["level_weights"] = level_weights
    if state is not None:
        given = [
            None
            if s is None
            else [t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in s]
            for s in state
        ]
        leaves += [t for s in given if s is not None for t in s if t is not None and t.requires_grad]
        state = tuple(None if s is None else type(old)(*s) for s, old in zip(given, state))
    y, final = memory(x, levels, initial_state=state, output_final_state=True, impl=impl, **options)
    results = [y, *flat(final)]
    functional = sum((r * random_tensor(*r.shape, seed=i)).sum() for i, r in enumerate(results))
    gradients = torch.autograd.grad(functional, [x, *leaves], allow_unused=True, materialize_grads=True)
    return results, [s.position for s in final if s is not None], gradients


def forget_all_but_the_last(monkeypatch):
    """The cut into segments that a call makes which has room for two chunks of many."""
    monkeypatch.setattr(loop, "spans", lambda chunks, every, size: spans(chunks, None, Footprint(1, 1, 2)))


def assert_same(x, levels, *, tolerance=1e-10, memory=continuum_memory, **options):
    found = run_with_gradients(x, levels, "eager", memory=memory, **options)
    expected = run_with_gradients(
        x, levels, "reference", **{k: v for k, v in options.items() if k != "checkpoint_every"}
    )
    close(found[0], expected[0], tolerance)
    assert all(torch.equal(f, e) for f, e in zip(found[1], expected[1]))
    close(found[2], expected[2], tolerance)
    return found


PADDINGS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]],
    "anywhere": [[1, 0, 1, 1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 1, 1, 0]],
    "short": [[0, 0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0]],
}


def chain(length, batch=3, rule="dgd"):
    return [
        make_level(1, rule=rule, chunk_size=2, rate=rates(batch, length), error_bound=0.3),
        make_level(2, rule=rule, gated=True, chunk_size=4, rate=0.04, hidden=3),
        make_level(3),
    ]
