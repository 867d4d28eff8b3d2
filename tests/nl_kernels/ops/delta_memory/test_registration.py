"""The operators under PyTorch's transformations: checks, compile, checkpointing, functional, autocast."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from nl_kernels import delta_memory, delta_memory_step
from nl_kernels.doctor import relative_error
from tests.nl_kernels.budgets import RoundedProducts
from tools.op_inputs import delta_memory_inputs

OPTIONS = (0.5, "running", 8, "eager")


def inputs(**options):
    defaults = {"key_heads": 1, "momentum": True, "initial_state": True, "requires_grad": True}
    return delta_memory_inputs(2, 11, 2, 4, 3, **defaults | options)


def loss_of(x, **options):
    o, final = delta_memory(**x, output_final_state=True, chunk_size=8, **options)
    states = final if isinstance(final, tuple) else (final,)
    return o.square().sum() + sum(state.square().sum() for state in states)


def gradients_of(loss, x):
    names = [name for name, value in x.items() if value is not None]
    return dict(zip(names, torch.autograd.grad(loss, [x[name] for name in names])))


def assert_same(actual, expected, tolerance=1e-6):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert relative_error(actual[name], expected[name]) < tolerance, name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(momentum, packed, dtype):
    x = delta_memory_inputs(
        1,
        11,
        4,
        4,
        3,
        key_heads=2,
        momentum=momentum,
        initial_state=momentum,
        sequences=2 if packed else None,
        dtype=dtype,
    )
    tensors = (*x.values(), torch.tensor([0, 4, 11]) if packed else None)
    torch.library.opcheck(torch.ops.nl_kernels.delta_memory_forward, (*tensors, *OPTIONS))
    state = torch.randn(2 if packed else 1, 4, 3, 4)
    cotangents = (torch.randn_like(x["v"]), state, state if momentum else None)
    torch.library.opcheck(torch.ops.nl_kernels.delta_memory_backward, (*cotangents, *tensors, *OPTIONS))


@pytest.mark.parametrize("momentum", [False, True])
def test_opcheck_of_the_step(momentum):
    x = delta_memory_inputs(2, 1, 2, 4, 3, key_heads=1, momentum=momentum, initial_state=True)
    tokens = tuple(value if value is None else value[:, 0] for value in list(x.values())[:6])
    states = (x["initial_state"], x["initial_momentum"])
    torch.library.opcheck(torch.ops.nl_kernels.delta_memory_step, (*tokens, *states, 0.5, "running", "eager"))


@pytest.mark.parametrize("momentum", [False, True])
def test_results_share_no_memory_with_the_inputs(momentum):
    x = delta_memory_inputs(1, 1, 1, 4, momentum=momentum, initial_state=True)
    memories = {value.data_ptr() for value in x.values() if value is not None}
    for needs_grad in (False, True):
        for value in x.values():
            if value is not None:
                value.requires_grad_(needs_grad)
        o, final = delta_memory(**x, output_final_state=True)
        for result in (o, *(final if momentum else (final,))):
            assert result.data_ptr() not in memories


@pytest.mark.parametrize("packed", [False, True])
def test_compile_without_a_graph_break(packed):
    x = delta_memory_inputs(
        1, 11, 2, 4, momentum=True, initial_state=True, sequences=2 if packed else None, requires_grad=True
    )
    bounds = torch.tensor([0, 4, 11]) if packed else None
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    actual = gradients_of(compiled(x, cu_seqlens=bounds), x)
    assert_same(actual, gradients_of(loss_of(x, cu_seqlens=bounds), x))


def test_compile_a_step_without_a_graph_break():
    x = delta_memory_inputs(2, 1, 2, 4, initial_state=True)
    token = {name: x[name][:, 0] for name in ("q", "k", "v", "log_decay", "erase")}
    expected, _ = delta_memory_step(**token, state=x["initial_state"])
    compiled = torch.compile(delta_memory_step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**token, state=x["initial_state"])[0], expected)


def test_compile_for_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 17, 30):
        x = delta_memory_inputs(2, length, 2, 4, requires_grad=True)
        assert_same(gradients_of(compiled(x), x), gradients_of(loss_of(x), x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    x = inputs()
    expected = gradients_of(loss_of(x), x)
    values = [value for value in x.values() if value is not None]
    names = [name for name, value in x.items() if value is not None]

    def function(*values):
        return loss_of(dict(zip(names, values)))

    loss = checkpoint(function, *values, use_reentrant=use_reentrant)
    loss.backward()
    assert_same({name: x[name].grad for name in names}, expected)


def test_selective_checkpointing_knows_the_operator():
    x = inputs()
    keep = [torch.ops.nl_kernels.delta_memory_forward.default]
    context = functools.partial(create_selective_checkpoint_contexts, keep)
    loss = checkpoint(loss_of, x, use_reentrant=False, context_fn=context)
    assert_same(gradients_of(loss, x), gradients_of(loss_of(x), x))


def test_functional_gradient_and_vmap():
    x = inputs(requires_grad=False)
    names = [name for name, value in x.items() if value is not None]

    def loss(values):
        return loss_of(dict(zip(names, values)))

    leaves = {name: x[name].clone().requires_grad_() for name in names}
    expected = gradients_of(loss_of(leaves), leaves)
    actual = torch.func.grad(loss)([x[name] for name in names])
    assert_same(dict(zip(names, actual)), expected)

    # Keys and initial momentum are shared by the whole batch; the others differ.
    batches = [
        x[name] if name in ("k", "initial_momentum") else torch.stack([x[name], 0.5 * x[name]])
        for name in names
    ]
    in_dims = ([None if name in ("k", "initial_momentum") else 0 for name in names],)
    actual = torch.func.vmap(torch.func.grad(loss), in_dims)(batches)
    for i in range(2):
        one = [b if d is None else b[i] for b, d in zip(batches, in_dims[0])]
        expected = torch.func.grad(loss)(one)
        assert_same({n: a[i] for n, a in zip(names, actual)}, dict(zip(names, expected)))


def test_gradient_of_a_vmap_over_single_tokens():
    """One token has a path of its own, which must not lose the gradient under transforms."""
    x = delta_memory_inputs(3, 1, 2, 4, initial_state=True)
    names = [name for name, value in x.items() if value is not None]
    values = [x[name][:, None] for name in names]

    def loss(values):
        return torch.func.vmap(lambda one: loss_of(dict(zip(names, one))))(values).sum()

    leaves = {name: x[name].clone().requires_grad_() for name in names}
    expected = gradients_of(loss_of(leaves), leaves)
    actual = torch.func.grad(loss)(values)
    assert_same({n: g[:, 0] for n, g in zip(names, actual)}, expected)


def test_vmap_without_gradients():
    x = delta_memory_inputs(3, 5, 2, 4, momentum=True, initial_state=True)
    expected, final = delta_memory(**x, output_final_state=True)
    names = [name for name, value in x.items() if value is not None]

    def function(values):
        return delta_memory(**dict(zip(names, values)), output_final_state=True)

    o, (state, momentum_state) = torch.func.vmap(function)([x[name][:, None] for name in names])
    torch.testing.assert_close(o[:, 0], expected)
    torch.testing.assert_close(state[:, 0], final[0])
    torch.testing.assert_close(momentum_state[:, 0], final[1])


def test_a_second_derivative_is_refused():
    x = inputs()
    (gradient,) = torch.autograd.grad(loss_of(x), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_autocast_rounds_q_k_v_and_nothing_else():
    x = inputs()
    names = [name for name, value in x.items() if value is not None]
    rounded = {
        name: value.detach().to(torch.bfloat16) if name in ("q", "k", "v") else value.detach()
        for name, value in x.items()
        if value is not None
    }
    expected, (state, momentum_state) = delta_memory(**rounded, output_final_state=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, final = delta_memory(**x, output_final_state=True)
        step, _ = delta_memory_step(
            **{name: x[name][:, 0] for name in ("q", "k", "v", "log_decay", "erase", "momentum")},
            state=x["initial_state"],
            momentum_state=x["initial_momentum"],
        )
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, expected)
    assert torch.equal(final[0], state)
    assert torch.equal(final[1], momentum_state)
    torch.testing.assert_close(step, expected[:, 0], rtol=1e-2, atol=1e-2)
    gradients = gradients_of(
        o.float().sum() + final[0].sum(), {name: x[name] for name in names if name != "x"}
    )
    assert all(gradients[name].dtype == torch.float32 for name in gradients)
    leaves = {name: value.requires_grad_() for name, value in rounded.items()}
    o, final = delta_memory(**leaves, output_final_state=True)
    expected = gradients_of(o.float().sum() + final[0].sum(), leaves)
    for name in names:
        assert torch.equal(gradients[name], expected[name].float()), name


def test_only_needed_results_may_be_used():
    """Cotangents that never come (an unused output or state) count as zeros."""
    x = inputs(dtype=torch.float64)
    o, (state, momentum_state) = delta_memory(**x, output_final_state=True)
    for used in (o, state, momentum_state):
        names = ("k", "v", "momentum", "initial_momentum")
        actual = torch.autograd.grad(used.sum(), [x[n] for n in names], retain_graph=True, allow_unused=True)
        o2, (state2, momentum2) = delta_memory(**x, output_final_state=True, impl="reference")
        same = {id(o): o2, id(state): state2, id(momentum_state): momentum2}[id(used)]
        expected = torch.autograd.grad(same.sum(), [x[n] for n in names], allow_unused=True)
        for name, a, e in zip(names, actual, expected):
            assert relative_error(a, torch.zeros_like(a) if e is None else e) < 1e-10, name


def test_rounded_products_reach_into_the_operators():
    """The error budget of a 16-bit kernel is eager's error with 16-bit products: in the operators, too."""
    x = delta_memory_inputs(1, 40, 1, 16, requires_grad=True)

    def state_and_gradient():
        _, state = delta_memory(**x, output_final_state=True, impl="eager")
        return state, *torch.autograd.grad(state.sum(), x["k"])

    exact = state_and_gradient()
    with RoundedProducts(torch.float16):
        rounded = state_and_gradient()
    for found, expected in zip(rounded, exact):
        assert 1e-5 < relative_error(found, expected) < 1e-2
