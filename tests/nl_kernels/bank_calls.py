"""What the tests of both memories ask of a bank's planned calls: buffers, and operators."""

import torch

from nl_kernels.memory.kernels.arguments import Bank
from nl_kernels.memory.kernels.launch import plan_forward
from nl_kernels.memory.kernels.launch_backward import plan_backward
from nl_kernels.triton_support.kernel_call import KernelCall
from tests.nl_kernels.budgets import GuardedBuffer


def _map(value, change):
    """``change`` of every tensor in nested tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [_map(x, change) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _run_guarded(call: KernelCall, unwritten: list[torch.Tensor]) -> None:
    """Run a call with every buffer between guard bands, ``unwritten`` ones full of NaN; the results go
    back."""
    buffers: dict[int, tuple[torch.Tensor, GuardedBuffer]] = {}

    def guard(x):
        if not x.is_floating_point():
            return x
        if id(x) not in buffers:
            empty = any(x is y for y in unwritten)
            made = GuardedBuffer(x.shape, dtype=x.dtype) if empty else GuardedBuffer.holding(x)
            buffers[id(x)] = x, made
        return buffers[id(x)][1].tensor

    arguments = {name: _map(value, guard) for name, value in call.arguments.items()}
    scratch = arguments["scratch"]
    call.kernel[call.grid](**arguments, **call.constants)
    for x, buffer in buffers.values():
        if buffer.tensor is scratch:
            buffer.tensor.fill_(0)  # what no bank of this kind uses may stay as it was
        buffer.check(f"{call.kernel.__name__}, {tuple(x.shape)}")
        x.copy_(buffer.tensor)


def assert_calls_fill_their_buffers(inputs, options):
    """Every element of every result of both passes is written, and nothing outside of them."""
    calls, (o, first, last, first_snapshot, last_snapshot, *kept) = plan_forward(inputs, options)
    given = [x.clone() for x in inputs.tensors if x is not None]
    (forward,) = calls
    _run_guarded(forward, [o, *(x for x in kept if x is not None)])
    weights = Bank(first, last), Bank(first_snapshot, last_snapshot)
    count = 0
    for item in plan_backward(torch.randn_like(o), *weights, inputs, Bank(*kept), options):
        if isinstance(item, KernelCall):
            count += 1
            tokens = item.arguments.get("d_tokens", ())
            _run_guarded(item, [x for x in tokens if x is not None] if count == 2 else [])
        else:
            assert all(torch.isfinite(x).all() for x in item.tokens if x is not None)
    assert count == 2 * len(range(0, options.chunks, options.checkpoint_every))
    assert all(
        torch.equal(a, b) for a, b in zip(given, (x for x in inputs.tensors if x is not None), strict=True)
    )


def assert_operators_pass_opcheck(inputs, options):
    tests = ("test_schema", "test_faketensor")
    forward = torch.ops.nl_kernels.memory_forward
    torch.library.opcheck(forward, (*inputs.tensors, *options), test_utils=tests)
    made = forward(*inputs.tensors, *options)
    gradients = [torch.ones_like(x) for x in made[1:5]]
    backward = (torch.ones_like(made[0]), *gradients, *inputs.tensors, *made[5:], *options)
    torch.library.opcheck(torch.ops.nl_kernels.memory_backward, backward, test_utils=tests)
