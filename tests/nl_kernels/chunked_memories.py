"""What the tests of both chunked memories need: results with gradients, and their comparison."""

import torch
from hypothesis import assume

from nl_kernels.doctor import relative_error, tensors_of


def results(op, inputs, seed=0, **options):
    """Outputs, and gradients of all inputs under random cotangents for all of them."""
    leaves = [x for x in tensors_of(inputs) if x.requires_grad]
    o, state = op(**inputs, **options, output_final_state=True)
    values = [o, *tensors_of(state)]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in values]
    pairs = [(x, c) for x, c in zip(values, cotangents) if x.requires_grad]
    gradients = torch.autograd.grad(
        [x for x, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True, materialize_grads=True
    )
    return [x.detach() for x in values], list(gradients), state


def assert_same(found, expected, tolerance=1e-10):
    """Every tensor of ``found`` equals its partner relative to the partner's size."""
    assert len(found) == len(expected)
    for index, (a, b) in enumerate(zip(found, expected)):
        assert a.shape == b.shape
        assert torch.isfinite(b).all(), "the case itself is not finite"
        error = relative_error(a, b)
        assert error <= tolerance, f"tensor {index} of shape {tuple(b.shape)} differs by {error:.2e}"


def compare(op, inputs, tolerance=1e-10, largest=None, **options):
    """Eager against reference: outputs, final states and all gradients.

    Of cases drawn at random those with outputs beyond ``largest`` are none: without a bound on errors some
    grow beyond every number, where no path is right or wrong.
    """
    expected, expected_gradients, expected_state = results(op, inputs, impl="reference", **options)
    if largest is not None:
        assume(expected[0].abs().max() < largest)
    eager, eager_gradients, state = results(op, inputs, impl="eager", **options)
    assert_same(eager, expected, tolerance)
    assert_same(eager_gradients, expected_gradients, tolerance)
    assert state.position.tolist() == expected_state.position.tolist()


def assert_autocast_changes_no_backward_pass(op, inputs):
    """Gradients taken in a region of autocast are bitwise those taken outside."""
    leaves = tensors_of(inputs)
    o, _ = op(**inputs, chunk_size=4, read="running")
    expected = torch.autograd.grad(o.square().sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(o.square().sum(), leaves)
    assert all(map(torch.equal, found, expected))


def leaves_like(state):
    """The same state as new leaves that need gradients."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone().requires_grad_() if state.is_floating_point() else state
    if state is None:
        return None
    return type(state)(*(leaves_like(x) for x in state))


def at_rates_up_to_two(inputs):
    """The same with a largest rate of 1.5 and 2, of which retentions limit some, and rates near the limit."""
    like = inputs["rate_max"]
    numbers = {"rate_max": (1.5, 2.0), "rate_bias": (2.5, 4.0), "retention_bias": (0.5, 2.0)}
    return {
        **inputs,
        **{
            name: torch.tensor(values, dtype=like.dtype)[-len(like) :].requires_grad_(like.requires_grad)
            for name, values in numbers.items()
        },
    }


def join(states):
    """States of one sequence each as one batch."""
    first = states[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(states)
    return None if first is None else type(first)(*map(join, zip(*states)))


def tokens(inputs, start, stop, skip=("weights", "rate_max", "rate_bias", "retention_bias")):
    """The same inputs with tokens start … stop − 1 only."""
    return {name: x if x is None or name in skip else x[:, start:stop] for name, x in inputs.items()}


def cast(value, dtype):
    """Nested tuples and dicts with their floating tensors in ``dtype``."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: cast(x, dtype) for name, x in value.items()}
    return type(value)(*(cast(x, dtype) for x in value)) if isinstance(value, tuple) else value


def assert_steps_equal_the_definition(
    op, step, inputs, starts, steps, *, masked, inplace, tolerance=1e-10, impl=None, **options
):
    """One-token steps of sequences at different places, some with gaps, against the definition of each alone.

    Sequence i starts ``starts[i]`` tokens into its row of ``inputs``. With ``masked``, a step brings some
    sequences no token but NaN. The definition runs in fp64 whatever the dtype of ``inputs``.
    """
    shared = ("weights", "rate_max", "rate_bias", "retention_bias")
    batch = len(starts)
    rows = [
        {n: x if n in shared or x is None else x[i : i + 1] for n, x in cast(inputs, torch.float64).items()}
        for i in range(batch)
    ]
    definition = {**options, "impl": "reference", "output_final_state": True}
    outputs = [op(**row, **definition)[0] for row in rows]
    state = join([op(**tokens(row, 0, start), **definition)[1] for row, start in zip(rows, starts)]).clone()
    dtypes = {x.dtype for x in tensors_of(inputs)}
    state = cast(state, torch.float64 if torch.float64 in dtypes else torch.float32)
    places = list(starts)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        mask = torch.rand(batch, generator=generator) < 0.6 if masked else torch.ones(batch, dtype=torch.bool)
        token = {
            n: x if n in shared or x is None else torch.stack([x[i, place] for i, place in enumerate(places)])
            for n, x in inputs.items()
        }
        for name, x in token.items():
            if name not in shared and x is not None:
                x[~mask] = torch.nan
        addresses = [x.data_ptr() for x in tensors_of(state)]
        o, state = step(
            **token, state=state, mask=mask if masked else None, inplace=inplace, impl=impl, **options
        )
        if inplace:
            assert [x.data_ptr() for x in tensors_of(state)] == addresses
        for i in range(batch):
            expected = outputs[i][0, places[i]] if mask[i] else torch.zeros_like(o[i])
            found = o[i].to(expected.dtype)
            assert o.dtype == next(iter(inputs.values())).dtype
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        places = [place + int(m) for place, m in zip(places, mask)]
    ends = join([op(**tokens(row, 0, place), **definition)[1] for row, place in zip(rows, places)])
    assert_same(tensors_of(state), tensors_of(ends), tolerance)
    assert state.position.tolist() == ends.position.tolist()
