"""The benchmark harness: what is recorded, how ratios are taken, and that the tables come from the record."""

import itertools
import json
import time

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import peers, run, tables
from benchmarks.harness import (
    Case,
    Provider,
    check_same_outputs,
    environment,
    headline,
    relative_error,
    run_case,
)
from benchmarks.measure import (
    Budget,
    Ceilings,
    Timing,
    Unavailable,
    Work,
    peak_memory_cpu,
    random_tensors,
    time_interleaved,
)
from benchmarks.report import markdown_headlines, significant, times

CPU = torch.device("cpu")
BUDGET = Budget(samples=3, least=2, seconds=0.05)
CEILINGS = Ceilings(copy=1e10, matmul=1e11)
FIELDS = {
    "schema", "date", "git", "device", "device_name", "threads", "load_average", "versions", "op", "case",
    "mode", "shape", "dtype", "provider", "role", "headline", "note", "median_s", "p20_s", "p80_s", "n",
    "us_per_token", "compile_s", "peak_bytes", "state_bytes", "tflops", "gbps", "ceiling_percent",
    "copy_gbps", "matmul_tflops", "error_vs_fp64",
}  # fmt: skip


def toy_inputs(case, device):
    shape = (case.shape["B"], case.shape["T"], case.shape["D"])
    return random_tensors(0, {"x": shape}, device, case.dtype)["x"]


def toy_providers(case, device):
    def ours():
        x = toy_inputs(case, device)
        return Provider(lambda: (x * 2,), comparable=True)

    def slower():
        x = toy_inputs(case, device)

        def work():
            time.sleep(0.004)
            return (x + x,)

        return Provider(work, role="peer", comparable=True, note="sleeps")

    def cheaper():
        x = toy_inputs(case, device)
        return Provider(lambda: (x[:, :1],), role="peer", headline=False, note="does less")

    def missing():
        raise Unavailable("not installed")

    def broken():
        raise RuntimeError("no kernel\nand a long trace")

    return {
        "nl_kernels": ours, "slow peer": slower, "cheap peer": cheaper, "missing": missing, "broken": broken
    }  # fmt: skip


def failing_providers(case, device):
    def ours():
        raise RuntimeError("our own defect")

    return {"nl_kernels": ours}


def hungry_providers(case, device):
    def hungry():
        elements = 8 * 2**20 if case.shape["T"] > 64 else 1
        return Provider(lambda: (torch.ones(elements), torch.ones(elements)))

    return {"hungry": hungry, "failing": failing_providers(case, device)["nl_kernels"]}


def toy_reference(case, tokens):
    return 2 * toy_inputs(case, CPU)[:, :tokens].double()


def toy_case(**changes):
    settings = {
        "op": "toy",
        "name": "doubling",
        "mode": "forward",
        "shape": {"B": 1, "T": 32, "D": 4},
        "providers": toy_providers,
        "work": Work(flops=1e6, bytes=1e6),
        "reference": toy_reference,
    }
    return Case(**{**settings, **changes})


@pytest.fixture
def result():
    return run_case(toy_case(), CPU, shared=environment(CPU), ceilings=CEILINGS, budget=BUDGET)


def test_a_row_has_every_field_and_survives_json(result):
    assert [row["provider"] for row in result.rows] == ["nl_kernels", "slow peer", "cheap peer"]
    for row in result.rows:
        assert set(row) == FIELDS
        assert json.loads(json.dumps(row)) == row
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["n"] >= BUDGET.least
        assert row["us_per_token"] == pytest.approx(row["median_s"] / 32 * 1e6)
        assert row["tflops"] == pytest.approx(1e6 / row["median_s"] / 1e12)
        assert row["ceiling_percent"] == pytest.approx(100 * 1e-4 / row["median_s"])
    assert [row["error_vs_fp64"] for row in result.rows] == [0.0, 0.0, None]


def test_what_cannot_run_is_reported_with_its_reason(result):
    assert result.skipped == {"missing": "not installed", "broken": "RuntimeError: no kernel"}


def test_a_failure_of_ours_is_never_skipped():
    case = toy_case(providers=failing_providers)
    with pytest.raises(RuntimeError, match="our own defect"):
        run_case(case, CPU, shared=environment(CPU), ceilings=CEILINGS, budget=BUDGET)


def test_the_headline_is_ours_against_the_fastest_other_that_does_the_same(result):
    line = headline(result.rows)
    assert line.ours["provider"] == "nl_kernels"
    assert line.other["provider"] == "slow peer"  # the cheap one is faster, but does less
    assert line.speedup == line.other["median_s"] / line.ours["median_s"] > 1
    assert line.memory_ratio is None
    with_memory = [{**row, "peak_bytes": size} for row, size in zip(result.rows, (10, 50, 1))]
    assert headline(with_memory).memory_ratio == 5
    assert headline(result.rows[:1]) is None
    assert headline(result.rows[1:]) is None


def test_different_or_non_finite_results_are_refused():
    ones = torch.ones(1, 3)
    check_same_outputs({"a": (ones,), "b": (ones * 2,)})
    with pytest.raises(ValueError, match=r"b returns.*float64.*a returns.*float32"):
        check_same_outputs({"a": (ones,), "b": (ones.double(),)})
    with pytest.raises(ValueError, match="b returns"):
        check_same_outputs({"a": (ones,), "b": (ones, ones)})
    with pytest.raises(ValueError, match="a: result 0 is not finite"):
        check_same_outputs({"a": (ones / 0,)})


def test_the_error_is_relative_and_over_the_tokens_of_the_reference():
    reference = torch.ones(1, 2, 3, dtype=torch.float64)
    output = torch.cat([1.5 * torch.ones(1, 2, 3), 9 * torch.ones(1, 5, 3)], dim=1)
    assert relative_error(output, reference) == pytest.approx(0.5)


def test_timing_is_interleaved_and_stops_at_its_budget():
    calls = []
    runs = {
        "slow": lambda: (calls.append("slow"), time.sleep(0.02)),
        "quick": lambda: (calls.append("quick"), time.sleep(0.003)),
    }
    timings = time_interleaved(runs, CPU, Budget(samples=6, least=2, seconds=0.001))
    assert len(timings["slow"].samples) == len(timings["quick"].samples) == 2
    timings = time_interleaved(runs, CPU, Budget(samples=3, least=1, seconds=100.0))
    assert len(timings["slow"].samples) == len(timings["quick"].samples) == 3
    # A sleep is never shorter than asked, however busy the machine.
    assert timings["slow"].median >= 0.02
    assert timings["quick"].median >= 0.003
    turns = [name for name, _ in itertools.groupby(calls)]
    assert len(turns) > 6  # turn by turn, not one after the other


def test_quantiles_interpolate():
    timing = Timing([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (timing.median, timing.quantile(0.2), timing.quantile(0.875)) == (3.0, 1.8, 4.5)


def test_peak_memory_counts_what_one_run_allocates():
    case = toy_case(providers=hungry_providers, shape={"B": 1, "T": 65})
    expected = 2 * 4 * 8 * 2**20
    assert 0.95 * expected < peak_memory_cpu(case, "hungry", 1) < 1.2 * expected
    with pytest.raises(Unavailable, match="our own defect"):
        peak_memory_cpu(case, "failing", 1)


def test_inputs_are_reproducible_and_never_zero():
    first, second = (random_tensors(3, {"a": (5,), "b": (5,)}, CPU, torch.float32) for _ in range(2))
    assert torch.equal(first["a"], second["a"])
    assert not torch.equal(first["a"], first["b"])
    assert first["a"].count_nonzero() == 5


@pytest.mark.parametrize("changes", [{"mode": "backward"}, {"shape": {"B": 1}}])
def test_a_case_is_checked(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        toy_case(**changes)


def test_every_op_has_cases_that_are_unique_and_some_that_are_quick():
    for op in run.op_names():
        cases = run.load_cases(op)
        assert {case.op for case in cases} == {op}
        assert len({case.title for case in cases}) == len(cases)
        assert any(case.quick for case in cases)


def test_a_missing_peer_names_the_remedy():
    with pytest.raises(Unavailable, match="no-such-package is not installed; do this"):
        peers.load("no_such_package", "no-such-package", "do this")


def test_the_command_refuses_an_unknown_op():
    with pytest.raises(run.typer.BadParameter, match=r"no benchmark for \['nothing'\]"):
        run.select_cases(["nothing"], "cpu", quick=True)


@pytest.fixture
def record(result, tmp_path):
    """Two runs of one case at one length, the later one at a second length too."""
    path = tmp_path / "cpu.jsonl"
    runs = [("2026-01-01", 32, 1)] + [("2026-01-02", length, 2) for length in (32, 64, 128)]
    for date, length, speed in runs:
        changes = {"date": f"{date}T00:00:00Z", "shape": {"B": 1, "T": length, "D": 4}}
        run.append_rows(
            path, [{**row, **changes, "median_s": row["median_s"] * speed} for row in result.rows]
        )
    return path


def test_tables_show_the_latest_run_of_every_case(record):
    cases = tables.latest_cases(tables.read_rows(record))
    assert [rows[0]["shape"]["T"] for rows in cases] == [32, 64, 128]
    assert {row["date"] for rows in cases for row in rows} == {"2026-01-02T00:00:00Z"}


def test_markdown_is_filled_between_its_markers_and_only_there(record):
    cases = tables.latest_cases(tables.read_rows(record))
    text = "before\n<!-- benchmarks:headlines -->\nold\n<!-- benchmarks:end -->\nafter\n"
    filled = tables.fill_markers(text, cases)
    assert filled.startswith("before\n<!-- benchmarks:headlines -->\n")
    assert filled.endswith("<!-- benchmarks:end -->\nafter\n")
    assert "old" not in filled
    assert markdown_headlines(cases) in filled
    assert tables.fill_markers(filled, cases) == filled
    assert "sleeps" in tables.fill_markers(text.replace("headlines", "cases toy"), cases)
    assert "doubling" not in tables.fill_markers(text.replace("headlines", "cases other"), [])
    with pytest.raises(ValueError, match="markers"):
        tables.fill_markers("nothing here", cases)


def test_tables_drop_what_is_no_longer_asked():
    case = run.load_cases("delta_memory")[0]
    shape = dict(case.shape)
    row = {
        "device_name": "x",
        "threads": 1,
        "op": case.op,
        "case": case.name,
        "mode": case.mode,
        "dtype": "float32",
    }
    now, before, other = (
        [{**row, "shape": shape}],
        [{**row, "shape": {**shape, "T": shape["T"] + 1}}],
        [{**row, "op": "toy", "shape": shape}],
    )
    assert tables.still_asked([before, now, other]) == [now, other]


def test_the_tables_command_writes_csv_plots_and_markdown(record, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmarks:cases toy -->\n<!-- benchmarks:end -->\n")
    app = tables.typer.Typer()
    app.command()(tables.main)
    arguments = [
        str(record),
        "--write",
        str(page),
        "--csv",
        str(tmp_path / "a.csv"),
        "--plots",
        str(tmp_path),
    ]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "slow peer" in page.read_text()
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + len(record.read_text().splitlines())
    plots = sorted(path.name for path in tmp_path.glob("*.png"))
    assert plots == ["cpu-headlines.png", "cpu-toy-doubling-forward-d-4.png"]


def test_a_spoiled_record_names_its_line(record):
    record.write_text(record.read_text() + '{"schema": 0}\n')
    with pytest.raises(ValueError, match=r"cpu.jsonl:13: expected a row of schema"):
        tables.read_rows(record)


def test_significant_digits():
    assert [times(ratio) for ratio in (0.253, 1.0, 9.94, 118.0)] == ["0.25×", "1.0×", "9.9×", "118×"]
    values = (None, 0, 0.012345, 1.2345, 123.45, 123456.0)
    assert [significant(value) for value in values] == ["", "0", "0.0123", "1.23", "123", "123000"]


def test_help_makes_no_environment(monkeypatch, capfd):
    from benchmarks import peers_env

    monkeypatch.setattr(peers_env, "make", lambda *_: pytest.fail("an environment was made"))
    monkeypatch.setattr("sys.argv", ["peers_env", "--help"])
    assert peers_env.main() == 0
    assert "--op" in capfd.readouterr().out


def test_without_the_peer_its_kernels_are_left_out_in_one_line(monkeypatch, capsys):
    from benchmarks import peer_kernels

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    peer_kernels.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert "not installed" in line
