"""The doctor sees an op that is wrong and one that fails, and says what runs."""

import json

import pytest
import torch

from nl_kernels import doctor


@pytest.fixture(autouse=True)
def few_cases(monkeypatch):
    monkeypatch.setattr(doctor, "CASES", {n: doctor.CASES[n] for n in ("delta_memory", "newton_schulz")})


def test_a_machine_that_is_right(capsys, tmp_path):
    assert doctor.main(["--device", "cpu", "--json", str(tmp_path / "found.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "all right" in said
    assert torch.__version__ in said
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == ["delta_memory"] * 2 + ["newton_schulz"] * 2
    assert {row["implementation"] for row in rows} == {"eager"}
    assert all(row["right"] and 0 < row["error"] < 1e-4 for row in rows)
    assert max(map(len, said.splitlines())) <= 90


def spoilt(case, factor):
    """The same, wrong by a factor in anything but the float64 that it is compared with."""

    def call(impl, **x):
        o, *rest = results if isinstance(results := case.call(impl=impl, **x), tuple) else (results,)
        return (o if o.dtype == torch.float64 else o * factor, *rest)

    return case._replace(call=call)


def test_an_op_that_is_wrong(monkeypatch, capsys):
    wrong = spoilt(doctor.CASES["delta_memory"], 1.01)
    monkeypatch.setitem(doctor.CASES, "delta_memory", wrong)
    assert doctor.main(["--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert said.count("WRONG delta_memory") == 2
    assert said.count("ok    newton_schulz") == 2
    assert "wrong: delta_memory." in said


def test_gradients_are_looked_at(monkeypatch):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    case = doctor.CASES["delta_memory"]

    def call(impl, q, **x):
        return case.call(impl=impl, q=q if q.dtype == torch.float64 else Twice.apply(q), **x)

    monkeypatch.setitem(doctor.CASES, "delta_memory", case._replace(call=call))
    found = doctor.examine("delta_memory", 40, torch.device("cpu"), torch.float32)
    assert not found.right
    assert found.error == pytest.approx(1.0, abs=1e-3)


def test_an_op_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    def call(impl, **x):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(doctor.CASES, "delta_memory", doctor.CASES["delta_memory"]._replace(call=call))
    assert doctor.main(["--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert said.count("FAILS delta_memory") == 2
    assert "RuntimeError: no such kernel" in said
    assert said.count("ok    newton_schulz") == 2


def test_no_gpu_is_a_clear_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        doctor.main(["--device", "cuda"])
    assert "torch sees no CUDA device here" in capsys.readouterr().err


def test_faults_of_the_compiler_are_named(monkeypatch):
    assert doctor.hazards(torch.device("cpu")) == {}
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.7.1")
    found = doctor.hazards(torch.device("cuda"))
    assert "wgmma groups not awaited" in found
