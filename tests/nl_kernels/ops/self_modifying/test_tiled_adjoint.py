"""The element-wise kernels of the tiled backward pass, interpreted, against autograd in fp64."""

import pytest
import torch

from nl_kernels.delta_adjoint import decay_adjoint
from nl_kernels.hidden_layer import hidden_gradient, hidden_layer
from nl_kernels.memory_rule import MemoryRule, bound_length, inverse_norm
from nl_kernels.ops.self_modifying import triton_tiled_adjoint as kernels
from nl_kernels.ops.self_modifying.triton_tiled_gates import gates_adjoint_kernel
from nl_kernels.testing import relative_error

pytestmark = pytest.mark.interpreter

ROWS, LENGTH, WIDTH = 3, 16, 6
TILES = {"LENGTH": LENGTH, "ROWS": 8, "BLOCK": 16}


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def run(kernel, memories, arguments, **constants):
    """One program a tile of tokens; what is a tuple of sizes is filled by the kernel, and returned."""
    made = {name: torch.full(x, torch.nan) for name, x in arguments.items() if isinstance(x, tuple)}
    given = {
        name: x.float().contiguous() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    names = kernel.arg_names
    missing = {name: None for name in names if name.islower() and name not in given}
    constants = {name: x for name, x in {**TILES, **constants}.items() if name in names}
    kernel[(memories * ROWS * LENGTH // 8,)](**{**given, **made, **missing}, **constants)
    return made


def assert_close(found, expected):
    assert relative_error(found, expected) < 3e-6


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("projection", "residual", "target"), [(True, False, True), (False, True, False)])
def test_keys_and_values(paired, projection, residual, target):
    """Through the unit length of keys; residuals take the errors' adjoints, in both layouts."""
    raw = draw(2, ROWS, LENGTH, WIDTH).requires_grad_()
    k, v = raw[0] * inverse_norm(raw[0]), raw[1]
    at_pair, at_x, at_error, output = (
        draw(2, ROWS, LENGTH, WIDTH),
        draw(*k.shape),
        draw(3, *k.shape),
        draw(*k.shape),
    )
    coefficient = draw(ROWS, LENGTH)
    total = (k * at_x).sum() + (k.square().sum(-1) * coefficient).sum() / 2
    total = total + ((k * at_pair[0] + v * at_pair[1]) if paired else (k - v) * at_pair[0]).sum()
    total = total - target * (v * at_error).sum()
    total = total + (k * (projection * at_error[:2].sum(0) + residual * at_error[2])).sum()
    (expected,) = torch.autograd.grad(total, raw)
    layout = {"error_pitch": WIDTH, "error_apart": ROWS * LENGTH * WIDTH}
    if not paired:
        at_error = torch.cat([at_error.permute(1, 2, 0, 3).flatten(2), draw(ROWS, LENGTH, 4)], -1)
        layout = {"error_pitch": 3 * WIDTH + 4, "error_apart": WIDTH}
    made = run(
        kernels.key_value_adjoint_kernel,
        1,
        {
            "at_pair": at_pair if paired else at_pair[0],
            "at_x": at_x,
            "coefficient": coefficient,
            "at_error": at_error,
            "made": torch.stack([k, v]).detach(),
            "key_scale": inverse_norm(raw[0]).detach(),
            "at_output": output if paired else None,
            "operand": (3, ROWS, LENGTH, WIDTH),
            "plain": (2, ROWS, LENGTH, WIDTH),
            "batches": ROWS,
            "at_output_rows": LENGTH,
            "at_output_start": 0,
            **layout,
        },
        WIDTH=WIDTH,
        PAIRED=paired,
        PROJECTION=projection,
        RESIDUAL=residual,
        TARGET=target,
    )  # fmt: skip
    assert_close(made["plain"], expected)
    last = output if paired else torch.zeros_like(output)
    assert_close(made["operand"], torch.cat([expected, last[None]]))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize(("normalized", "bound"), [(True, 1.0), (False, 0.0), (True, 0.3)])
def test_errors_and_signals_back_to_the_hidden_layers(activation, normalized, bound):
    """z at keys and values → difference → errors → bounds → signals: all second-order terms."""
    rule = MemoryRule(activation=activation, normalize_hidden=normalized, error_bound=bound or None)
    z = draw(2, ROWS, LENGTH, 5, WIDTH).requires_grad_()
    last, gate = draw(3, ROWS, 7, WIDTH).requires_grad_(), draw(ROWS, 2, WIDTH).requires_grad_()
    hidden = [hidden_layer(x.permute(2, 0, 1, 3), rule) for x in z]
    difference = hidden[0].value - hidden[1].value
    raw = torch.einsum("mntx,mnox->mnto", difference[:3], last)
    gate_raw = (difference[3:] * gate.transpose(0, 1)[:, :, None]).sum(-1)
    error = bound_length(raw, rule.error_bound)
    gate_error = bound_length(gate_raw[..., None], rule.error_bound)
    back = torch.cat(
        [torch.einsum("mnto,mnox->mntx", error, last), gate_error * gate.transpose(0, 1)[:, :, None]]
    )
    signal = hidden_gradient(back, hidden[0], rule)
    at_signal, at_error, at_gate = draw(*signal.shape), draw(*error.shape), draw(2, ROWS, LENGTH)
    at_value, coefficient = draw(*signal.shape), draw(5, ROWS, LENGTH)
    total = (signal * at_signal).sum() + (error * at_error).sum() + (gate_error[..., 0] * at_gate).sum()
    total = total + (hidden[0].value * at_value).sum()
    total = total + (hidden[0].value.square().sum(-1) * coefficient).sum() / 2
    # The adjoint of difference by way of the errors stands where autograd has it.
    expected_z, at_last, at_gate_last = torch.autograd.grad(total, (z, last, gate))

    together = (ROWS, LENGTH, 5, WIDTH)
    right, gate_right = draw(*together), draw(2, ROWS, LENGTH)
    common = {"z": z.detach(), "gates": gate.detach(), "batches": ROWS}
    common |= {"gates_rows": 2, "gates_start": 0}
    constants = {"WIDTH": WIDTH, "ACTIVATION": activation, "NORMALIZED": normalized, "BOUND": bound}
    shape = (5, ROWS, LENGTH, WIDTH)
    made = run(
        kernels.signal_adjoint_kernel,
        5,
        {
            **common,
            "at_signal": at_signal.permute(1, 2, 0, 3),
            "back": back.detach(),
            "right": right,
            "at_value": at_value,
            "coefficient": coefficient,
            "gate_error": gate_error.detach(),
            "gate_right": gate_right,
            "at_gate_signal": at_gate,
            "at_back": shape,
            "at_value_after": shape,
            "at_slope": shape,
            "radial": shape[:3],
            "before": shape[:3],
            "at_gate_error": (2, ROWS, LENGTH),
            "gate_before": (2, ROWS, LENGTH),
        },
        **constants,
    )
    recalled = right.permute(2, 0, 1, 3) - signal.detach()
    assert_close(made["before"], (at_signal * recalled).sum(-1))
    assert_close(made["gate_before"], at_gate * (gate_right - gate_error[..., 0].detach()))
    raw_adjoint = at_error + torch.einsum("mntx,mnox->mnto", made["at_back"][:3].double(), last)
    factor = error.detach().norm(dim=-1) / raw.detach().norm(dim=-1)
    before = draw(3, ROWS, LENGTH, 7)
    bounded = run(
        kernels.error_adjoint_kernel,
        3,
        {
            "at_error": raw_adjoint.detach(),
            "error": error.detach(),
            "factor": factor.where(factor < 1 - 1e-9, 1.0),
            "right": before,
            "solved": at_error,
            "operand": tuple(error.shape),
            "plain": tuple(error.shape),
            "before": (3, ROWS, LENGTH),
        },
        WIDTH=7,
        BOUND=bound,
    )
    assert_close(bounded["before"], (at_error * (before - error.detach())).sum(-1))
    assert torch.equal(bounded["operand"], bounded["plain"])
    at_raw = bounded["plain"].double()
    found = torch.einsum("mnto,mntx->mnox", at_raw, difference[:3].detach())
    found += torch.einsum("mnto,mntx->mnox", error.detach(), made["at_back"][:3].double())
    assert_close(found, at_last)
    found = torch.einsum("mnt,mntx->nmx", made["at_gate_error"].double(), difference[3:].detach())
    found += torch.einsum("mnt,mntx->nmx", gate_error[..., 0].detach(), made["at_back"][3:].double())
    assert_close(found, at_gate_last)
    found = run(
        kernels.pair_adjoint_kernel,
        5,
        {
            **common,
            "at_value": made["at_value_after"],
            "at_difference": torch.einsum("mnto,mnox->mntx", at_raw, last.detach()),
            "at_gate_error": made["at_gate_error"],
            "radial": made["radial"],
            "at_slope": made["at_slope"],
            "operand": tuple(z.shape),
        },
        **constants,
    )
    assert_close(found["operand"], expected_z)


@pytest.mark.parametrize("bound", [0.7, 0.0])
def test_errors_of_linear_memories(bound):
    total = 3 * WIDTH + 16
    raw = draw(ROWS, LENGTH, total).requires_grad_()
    wide, gates = raw.split([3 * WIDTH, 16], -1)
    wide = bound_length(wide.unflatten(-1, (3, WIDTH)), bound or None)
    error = torch.cat([wide.flatten(2), bound_length(gates[..., None], bound or None)[..., 0]], -1)
    at_error, right = draw(*error.shape), draw(*error.shape)
    (expected,) = torch.autograd.grad((error * at_error).sum(), raw)
    factor = wide.detach().norm(dim=-1) / raw.detach()[..., : 3 * WIDTH].unflatten(-1, (3, WIDTH)).norm(
        dim=-1
    )
    made = run(
        kernels.linear_error_adjoint_kernel,
        3,
        {
            "at_error": at_error,
            "error": error.detach(),
            "factor": factor.where(factor < 1 - 1e-9, 1.0).permute(2, 0, 1),
            "right": right,
            "operand": tuple(error.shape),
            "plain": tuple(error.shape),
            "before": (3, ROWS, LENGTH),
            "batches": ROWS,
        },
        WIDTH=WIDTH,
        GATES=16,
        BOUND=bound,
    )  # fmt: skip
    assert_close(made["operand"], expected)
    assert_close(made["plain"], expected)
    assert_close(made["before"].sum(0), (at_error * (right - error.detach())).sum(-1))


@pytest.mark.parametrize("served", [2, 3])
def test_hidden_layers_that_served(served):
    rule = MemoryRule()
    z, at_value, at_gate, gate = (
        draw(5, ROWS, LENGTH, WIDTH),
        draw(3, ROWS, LENGTH, WIDTH),
        draw(2, ROWS, LENGTH),
        draw(ROWS, 5, WIDTH),
    )
    z.requires_grad_()
    value = hidden_layer(z, rule).value
    by_gate = (value[3:] * gate[:, 2:4].transpose(0, 1)[:, :, None]).sum(-1)
    total = (value[:served] * at_value[:served]).sum() + (by_gate * at_gate).sum()
    (expected,) = torch.autograd.grad(total, z)
    found = run(
        kernels.served_adjoint_kernel,
        5,
        {"at_value": at_value, "at_gate": at_gate, "gates": gate, "z": z.detach(), "operand": tuple(z.shape),
         "batches": ROWS, "gates_rows": 5, "gates_start": 2},
        WIDTH=WIDTH, SERVED=served, ACTIVATION="silu", NORMALIZED=True,
    )  # fmt: skip
    assert_close(found["operand"], expected)


@pytest.mark.parametrize("running", [False, True])
def test_inputs(running):
    """Tokens 3 … 12 of 20; the query through its unit length."""
    tokens, first, count = 20, 3, 10
    inputs, made, gates, read = (
        draw(5, ROWS, LENGTH, WIDTH),
        draw(2, ROWS, LENGTH, WIDTH),
        draw(ROWS, LENGTH, WIDTH),
        draw(ROWS, LENGTH, WIDTH),
    )
    query = draw(ROWS, tokens, WIDTH).requires_grad_()
    output = draw(ROWS, tokens, WIDTH)
    place = slice(first, first + count)
    unit = (query * inverse_norm(query))[:, place]
    at_query = (read if running else inputs[2])[:, :count] + output[:, place]
    (expected,) = torch.autograd.grad((unit * at_query).sum(), query)
    names = ("d_query", "d_key_input", "d_value_input", "d_gate_input")
    found = run(
        kernels.input_adjoint_kernel,
        1,
        {
            "at_inputs": inputs,
            "at_gates": gates if running else None,
            "at_made": made,
            "at_read": read if running else None,
            "at_output": output,
            "query": query.detach(),
            **{name: tuple(query.shape) for name in names},
            "batches": ROWS,
            "out_rows": tokens,
            "out_start": first,
            "out_limit": count,
        },
        WIDTH=WIDTH,
    )
    assert_close(found["d_query"][:, place], expected[:, place])
    assert_close(found["d_key_input"][:, place], (inputs[0] + made[0])[:, :count])
    assert_close(found["d_value_input"][:, place], (inputs[1] + made[1])[:, :count])
    by_gates = gates if running else inputs[3] + inputs[4]
    assert_close(found["d_gate_input"][:, place], by_gates[:, :count])
    outside = [found[name][:, i] for name in names for i in (*range(first), *range(first + count, tokens))]
    assert torch.stack(outside).isnan().all()


@pytest.mark.parametrize("two_layer", [True, False])
def test_gates(two_layer):
    """Spans of all layers and reads, to logits and to the sums of the gates' parameters."""
    length, tokens, start = 12, 20, 12
    groups = [(1, 5), (3, 3), (2, 2)] if two_layer else [(1, 3)]
    eager, given = {}, {}
    rates = torch.zeros(ROWS, length, dtype=torch.float64)
    final = draw(5 * ROWS, 2)
    final[ROWS:] = final[:ROWS].repeat(4, 1)

    def add(name, value):
        eager[name] = eager.get(name, 0) + value

    def triangle(count, strict):
        keep = torch.ones(length, length).tril(-1 if strict else 0)
        return draw(count, ROWS, length, length) * keep

    def by_token(count):
        return torch.nn.functional.pad(draw(count, ROWS, length), (0, LENGTH - length))

    for i, (count, parts) in enumerate(groups):
        strict = triangle(count, True)
        eta = draw(count, ROWS, LENGTH)
        part = {"before": by_token(parts), "to_end": by_token(count), "at_rate": by_token(count)}
        inner = draw(count, ROWS, 2, 3)
        given |= {f"{name}{i}": x for name, x in part.items()} | {f"inner{i}": inner, f"rate{i}": eta}
        # Two tiles of rows and columns: sums of any split.
        scaled = -strict * eta[..., None, :length]
        by_row, by_column = (torch.zeros(count, ROWS, 2, LENGTH, dtype=torch.float64) for _ in range(2))
        for j, half in enumerate((slice(0, 7), slice(7, None))):
            by_row[:, :, j, :length] = scaled[..., half].sum(-1)
            by_column[:, :, j, :length] = strict[:, :, half].sum(-2)
        given |= {f"strict_rows{i}": by_row, f"strict_columns{i}": by_column}
        add("strict", scaled.sum(0))
        for name in ("before", "to_end"):
            add(name, part[name].sum(0)[:, :length, None])
        add("final", (inner[:, :, 1].sum(-1) * final[:ROWS, 1]).sum(0)[:, None, None])
        rates += part["at_rate"].sum(0)[:, :length]
    for i in range(1 + two_layer):
        full, after = triangle(1, False)[0], by_token(1)[0]
        by_row, by_column = (torch.zeros(ROWS, 2, LENGTH, dtype=torch.float64) for _ in range(2))
        by_row[:, 0, :length], by_column[:, 1, :length] = full.sum(-1), full.sum(-2)
        given |= {f"after{i}": after, f"full_rows{i}": by_row, f"full_columns{i}": by_column}
        add("full", full)
        add("after", after[:, :length, None])
    at_log = decay_adjoint(length, final, **eager)
    begin, stop = torch.tensor([0, 13, 3]), torch.tensor([20, 18, 20])
    slot = torch.arange(start, start + length)
    valid = (slot < tokens) & (slot >= begin[:, None]) & (slot < stop[:, None])
    logits = draw(2, ROWS, LENGTH)
    rate_max = torch.rand(ROWS, dtype=torch.float64)
    z = logits[..., :length].clone().requires_grad_()
    largest = rate_max.clone().requires_grad_()
    eta = (largest[:, None] * torch.sigmoid(z[0])).where(valid, 0)
    log = torch.nn.functional.logsigmoid(z[1]).where(valid, 0)
    expected, at_largest = torch.autograd.grad((eta * rates).sum() + (log * at_log).sum(), (z, largest))
    weights = {f"WEIGHT_{name}{i}": n for i in range(3) for name, n in (("TILES", 3), ("BLOCK", 4))}
    parameters = draw(ROWS, 3)
    arguments = {
        **given,
        "final": final,
        "logits": logits,
        "rate_max": rate_max,
        "begin": begin,
        "stop": stop,
        "origin": torch.zeros(ROWS, dtype=torch.int64),
        "at_logits": (2, ROWS, LENGTH),
        "operand": (ROWS, LENGTH, 16),
    }
    known = {
        name: x.float().contiguous() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    total = parameters.float()
    made = {name: torch.full(x, torch.nan) for name, x in arguments.items() if isinstance(x, tuple)}
    kernel = gates_adjoint_kernel
    absent = {"shared_to_end": None, "shared_log": None}
    absent |= {name: None for name in kernel.arg_names if name[-1] in "012" and name.islower()}
    kernel[(ROWS,)](
        **{**absent, **known, **made}, at_parameters=total, batches=ROWS, tokens=tokens, offset=0, chunks=2,
        chunk=1, CHUNK=length, LENGTH=LENGTH, TILES=2, GATES=16, PARTS0=groups[0][1], **weights, BLOCK=16,
    )  # fmt: skip
    assert_close(made["at_logits"][..., :length], expected)
    assert_close(made["operand"][:, :length, :2], expected.permute(1, 2, 0))
    assert made["operand"][..., 2:].abs().max() == 0
    sums = torch.stack([at_largest, *expected.sum(-1)], -1)
    assert_close(total, parameters + sums)
