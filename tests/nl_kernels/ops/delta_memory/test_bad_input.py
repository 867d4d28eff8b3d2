"""Every refused input: the error names the argument, what came and what is accepted."""

import pytest
import torch

from nl_kernels import chunk_gated_delta_rule, delta_memory, delta_memory_step
from tools.op_inputs import delta_memory_inputs

NAN = float("nan")


def changed(name, change, **options):
    x = delta_memory_inputs(2, 5, 2, 4, 3, momentum=True, initial_state=True)
    x[name] = change(x[name])
    return x | options


def with_value(value):
    def change(x):
        x = x.clone()
        x.view(-1)[3] = value
        return x

    return change


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("q", lambda x: x[0], ValueError, r"q: expected \[B, T, H, D\].*\(5, 2, 4\)"),
        ("q", lambda x: x[:, :0], ValueError, "q: .*no empty axis"),
        ("q", lambda x: x.int(), TypeError, "q: .*torch.int32"),
        ("q", lambda x: x.tolist(), TypeError, "q: expected a tensor, got list"),
        ("k", lambda x: x[:, :4], ValueError, r"k: expected shape \(2, 5, 2, 4\), got \(2, 4, 2, 4\)"),
        ("k", lambda x: x.half(), TypeError, "k: expected q's dtype torch.float32, got torch.float16"),
        ("v", lambda x: x[:, :, :1], ValueError, "v: expected a multiple of q's 2 heads, got 1"),
        ("v", lambda x: x.double(), TypeError, "v: expected q's dtype"),
        ("v", lambda x: x.to("meta"), ValueError, "v: expected a tensor on cpu, got one on meta"),
        ("log_decay", lambda x: x[..., None], ValueError, r"log_decay: expected shape \(2, 5, 2\)"),
        ("log_decay", with_value(0.1), ValueError, r"log_decay: expected values in \[-inf, 0.0\], got 0.1"),
        ("log_decay", with_value(NAN), ValueError, "log_decay: .*nan"),
        ("erase", with_value(-0.1), ValueError, r"erase: expected values in \[0.0, 2.0\), got -0.1"),
        ("erase", with_value(2.0), ValueError, r"erase: .*got 2.0"),
        ("erase", with_value(float("inf")), ValueError, "erase: .*inf"),
        ("erase", with_value(NAN), ValueError, "erase: .*nan"),
        ("erase", lambda x: x.long(), TypeError, "erase: .*torch.int64"),
        ("momentum", with_value(1.0), ValueError, r"momentum: expected values in \[0.0, 1.0\), got 1.0"),
        ("momentum", with_value(-0.5), ValueError, "momentum: .*-0.5"),
        ("momentum", lambda x: x[:1], ValueError, r"momentum: expected shape \(2, 5, 2\)"),
        ("momentum", lambda x: None, ValueError, "initial_momentum: given without momentum"),
        ("initial_state", lambda x: x.mT, ValueError, r"initial_state: expected shape \(2, 2, 3, 4\)"),
        ("initial_momentum", lambda x: x[:1], ValueError, "initial_momentum: expected shape"),
    ],
)
def test_tensors(name, change, error, message):
    with pytest.raises(error, match=message):
        delta_memory(**changed(name, change))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"read": "now"}, ValueError, "read: .*'running', 'before'.*'now'"),
        ({"read": "after"}, ValueError, r"read: 'after' is called 'running' since version 0\.2"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1, got 0"),
        ({"chunk_size": 64.0}, TypeError, "chunk_size: expected an int, got float"),
        ({"scale": "1"}, TypeError, "scale: expected a float, got str"),
        ({"scale": NAN}, ValueError, "scale: expected a finite number, got nan"),
        ({"impl": "cuda"}, ValueError, "impl: .*'cuda'"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens: .*B = 1, got 2"),
    ],
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        delta_memory(**changed("q", lambda q: q, **options))


@pytest.mark.parametrize(
    ("bounds", "error"),
    [
        (torch.tensor([0, 3, 3, 5]), ValueError),
        (torch.tensor([0, 3]), ValueError),
        (torch.tensor([1, 5]), ValueError),
        (torch.tensor([[0, 5]]), ValueError),
        (torch.tensor([0.0, 5.0]), TypeError),
        (torch.tensor([0, 5], device="meta"), ValueError),
        ([0, 5], TypeError),
    ],
)
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_bounds(bounds, error, impl):
    x = delta_memory_inputs(1, 5, 2, 4)
    with pytest.raises(error, match="cu_seqlens: expected"):
        delta_memory(**x, cu_seqlens=bounds, impl=impl)


def test_packed_states_are_one_per_sequence():
    x = delta_memory_inputs(1, 5, 2, 4, initial_state=True)
    with pytest.raises(ValueError, match=r"initial_state: expected shape \(2, 2, 4, 4\), got \(1, 2, 4, 4\)"):
        delta_memory(**x, cu_seqlens=torch.tensor([0, 2, 5]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 1, 2, 4)}, r"q: expected \[B, H, D\]"),
        ({"state": torch.zeros(2, 2, 4, 3)}, r"state: expected shape \(2, 2, 3, 4\)"),
        ({"momentum": None}, "momentum_state: give it with momentum"),
        ({"momentum_state": None}, "momentum_state: give it with momentum"),
        ({"read": "after"}, r"read: 'after' is called 'running'"),
        ({"erase": torch.full((2, 2), 2.5)}, "erase: .*2.5"),
    ],
)
def test_step(change, message):
    x = delta_memory_inputs(2, 1, 2, 4, 3, momentum=True, initial_state=True)
    token = {name: x[name][:, 0] for name in ("q", "k", "v", "log_decay", "erase", "momentum")}
    states = {"state": x["initial_state"], "momentum_state": x["initial_momentum"]}
    with pytest.raises(ValueError, match=message):
        delta_memory_step(**token | states | change)


def test_the_alias_names_its_own_arguments():
    x = delta_memory_inputs(2, 5, 2, 4, 3, initial_state=True)
    arguments = [x[name] for name in ("q", "k", "v", "log_decay", "erase")]
    with pytest.raises(ValueError, match=r"g: expected values in \[-inf, 0.0\]"):
        chunk_gated_delta_rule(*arguments[:3], -arguments[3], arguments[4])
    with pytest.raises(ValueError, match=r"beta: expected shape \(2, 5, 2\)"):
        chunk_gated_delta_rule(*arguments[:4], arguments[4][:1])
    with pytest.raises(ValueError, match=r"initial_state: expected shape \(2, 2, 4, 3\), got \(2, 2, 3, 4\)"):
        chunk_gated_delta_rule(*arguments, initial_state=x["initial_state"])
    with pytest.raises(ValueError, match="scale"):
        chunk_gated_delta_rule(*arguments, scale=float("inf"))
