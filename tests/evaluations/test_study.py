"""Studies: equal parameters, rows, going on, the command, and the page."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from evaluations import __main__ as command
from evaluations import report, studies, study
from evaluations.models import MODELS, at_equal_parameters, make, parameters
from evaluations.streams import StreamStudy
from evaluations.study import Run, Study, best_setting, find, read_rows, remaining
from evaluations.tasks.formal_languages import FormalLanguage
from evaluations.training import train

SMALL = Study(
    name="small",
    tasks={"(aa)*": FormalLanguage, "parity": FormalLanguage},
    shape={"width": 16, "layers": 1, "heads": 2},
    training={"steps": 2, "batch_size": 2, "weight_decay": 0.0, "every": 1},
    settings={
        "lstm": [{"learning_rate": 1e-2}, {"learning_rate": 1e-3}],
        "attention": [{"learning_rate": 1e-2}, {"learning_rate": 1e-3}],
    },
    seeds=(0, 1),
)


@pytest.mark.parametrize("head", ["linear", "pooled", "tied"])
@pytest.mark.parametrize("name", MODELS)
def test_models_have_equal_parameters_and_see_no_future(name, head):
    torch.manual_seed(0)
    outputs = 5 if head == "tied" else 3
    sizes = {"width": 32, "layers": 1, "heads": 2, "head": head}
    if name == "lstm" and head == "tied":
        with pytest.raises(ValueError, match="an LSTM has none of these, got None, 'tied'"):
            at_equal_parameters(name, 5, outputs, **sizes)
        return
    model = at_equal_parameters(name, 5, outputs, **sizes).eval()
    reference = make("hope", 5, outputs, inner=64, **sizes)
    assert abs(parameters(model) / parameters(reference) - 1) <= 0.02
    wider = at_equal_parameters(name, 5, outputs, widening=3, **sizes)
    assert parameters(wider) > 1.02 * parameters(model)
    ids = torch.randint(5, (2, 20))
    changed = ids.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % 5
    with torch.no_grad():
        y, z = model(ids), model(changed)
    assert y.shape == (2, 20, outputs)
    assert torch.equal(y[:, :15], z[:, :15]) is (head != "pooled")
    assert not torch.allclose(y[:, 15:], z[:, 15:])


def test_what_cannot_be_made_is_refused():
    sizes = {"width": 16, "layers": 1, "heads": 2}
    with pytest.raises(ValueError, match=r"model: expected one of hope, .*, got 'mamba'"):
        at_equal_parameters("mamba", 5, 3, **sizes)
    with pytest.raises(ValueError, match=r"hope_two_layer: no inner width has .* to 2 %; the nearest has"):
        at_equal_parameters("hope_two_layer", 5, 3, options={"memory_hidden_size": 512}, **sizes)
    with pytest.raises(ValueError, match="options, head: an LSTM has none"):
        at_equal_parameters("lstm", 5, 3, options={"memory_chunk_size": 1}, **sizes)
    with pytest.raises(
        ValueError, match=r"every model is searched with as many, got {'lstm': 1, 'attention': 2}"
    ):
        dataclasses.replace(SMALL, settings={**SMALL.settings, "lstm": [{"learning_rate": 1e-2}]})
    with pytest.raises(ValueError, match=r"expected models of hope, .*, got \['gru'\]"):
        dataclasses.replace(SMALL, settings={"gru": []})
    with pytest.raises(ValueError, match=r"steps: expected tasks of \(aa\)\*, parity, got \['paritty'\]"):
        dataclasses.replace(SMALL, steps={"paritty": 3})


def test_what_is_just_below_zero_has_no_sign():
    rows = [{"scores": {"backward": x}} for x in (-0.0004, 0.0)]
    assert report.score(rows, "backward", "%") == "0"
    rows = [{"scores": {"backward": x}} for x in (-0.014, -0.002)]
    assert report.score(rows, "backward", "%") == "-0.8 (-1–0)"


def test_quick_studies_have_the_steps_that_are_asked_for():
    quick = studies._quick(studies.FORMAL_LANGUAGES, ["shuffle-2"], ["lstm"], 300)
    assert quick.training_of("shuffle-2")["steps"] == 300


def test_the_studies_search_every_model_alike_and_all_their_models_can_be_made():
    made = set()
    for one in (*studies.STUDIES.values(), *studies.QUICK.values()):
        assert len({len(one.settings[model]) for model in one.searched}) == 1
        assert one.settings.keys() <= report.TITLES.keys()
        if isinstance(one, StreamStudy):  # its methods are tested with it
            continue
        first, *_ = tasks = [make_task(name) for name, make_task in one.tasks.items()]
        assert all(task.vocabulary > 0 and task.outputs > 0 for task in tasks)
        for name, settings in one.settings.items():
            for setting in settings:
                sizes = (first.vocabulary, first.outputs)
                shape = {"options": setting.get("options"), "head": first.head, **one.shape}
                if (key := repr((name, sizes, shape))) not in made:
                    made.add(key)
                    at_equal_parameters(name, *sizes, **shape)
    assert all(claim.task in studies.STUDIES[claim.study].tasks for claim in studies.CLAIMS)


def test_a_run_ends_where_nothing_is_left_to_learn():
    def run(task, **options):
        torch.manual_seed(0)
        model = at_equal_parameters("lstm", task.vocabulary, task.outputs, width=16, layers=1, heads=2)
        options = {
            "batch_size": 8,
            "learning_rate": 2e-2,
            "weight_decay": 0.0,
            "every": 10,
            "seed": 0,
            **options,
        }
        return train(model, task, **options)

    outcome = run(FormalLanguage("(aa)*"), steps=400)
    assert outcome["steps"] < 400
    assert [min(scores.values()) for _, _, scores in outcome["curve"][-2:]] == [1.0, 1.0]
    assert outcome["scores"] == {"2-50": 1.0, "51-100": 1.0}
    task = FormalLanguage("(aa)*")
    task.goal = 1.1  # out of reach
    outcome = run(task, steps=2000)
    assert outcome["steps"] < 2000
    assert all(loss < 1e-6 for _, loss, _ in outcome["curve"][-3:])
    assert run(task, steps=10)["steps"] == 10


def row(run, scores, steps=2):
    return {**run.key(SMALL), "steps": steps, "scores": scores, "curve": [[steps, 0.1, scores]]}


def test_the_search_is_on_the_first_seed_and_the_best_is_repeated():
    first, second = SMALL.settings["lstm"]
    runs, rows, done = remaining(rows := [], SMALL, ["parity"], ["lstm"]), rows, []
    for run in runs:
        done.append(run)
        rows.append(row(run, {"2-50": 1.0, "51-100": 0.9 if run.setting == second else 0.2}))
    assert done == [Run("parity", "lstm", s, seed) for s, seed in ((first, 0), (second, 0), (second, 1))]
    assert len(done) == study.total(SMALL, ["parity"], ["lstm"])
    assert list(remaining(rows, SMALL, ["parity"], ["lstm"])) == []
    # Of equal ones the faster; a newer row replaces an older one; other training is another run.
    rows = [row(Run("parity", "lstm", s, 0), {"2-50": 1.0}, steps) for s, steps in ((first, 5), (second, 4))]
    assert best_setting(rows, SMALL, "parity", "lstm") == second
    rows.append(row(Run("parity", "lstm", first, 0), {"2-50": 1.0}, 3))
    assert best_setting(rows, SMALL, "parity", "lstm") == first
    other = dataclasses.replace(SMALL, training={**SMALL.training, "steps": 3})
    assert find(rows, other, Run("parity", "lstm", first, 0)) is None
    # So are a task's own steps, of that task alone.
    for task, expected in (("parity", None), ("(aa)*", rows[-1])):
        other = dataclasses.replace(SMALL, steps={task: 3})
        assert find(rows, other, Run("parity", "lstm", first, 0)) is expected
        assert other.training_of(task)["steps"] == 3 != SMALL.training["steps"]


@pytest.fixture
def app(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "STUDIES", {"formal_languages": SMALL})
    monkeypatch.setattr(command, "console", command.Console(width=80))

    def invoke(*arguments):
        return CliRunner().invoke(command.app, [*arguments, "--rows", str(tmp_path)])

    return invoke


def test_the_command_appends_rows_stops_in_time_and_goes_on(app, tmp_path, monkeypatch):
    path = tmp_path / "small.jsonl"
    stopped = app("formal_languages", "--minutes", "0")
    assert stopped.exit_code == 0, stopped.output
    assert "time is up" in stopped.output
    assert read_rows(path) == []

    options = ("formal_languages", "--only", "(aa)*", "--model", "lstm")
    monkeypatch.setattr(study.sys, "argv", ["evaluations", *options])
    result = app(*options)
    assert result.exit_code == 0, result.output
    assert "left" in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    rows = read_rows(path)
    assert len(rows) == 3
    assert rows[0]["command"] == "python -m evaluations formal_languages --only (aa)* --model lstm"
    for name in ("commit", "time", "torch", "parameters", "seconds", "scores", "seed", "task", "model"):
        assert rows[0][name] is not None
    before = path.read_text()
    assert "3 runs are there" in app(*options).output
    assert path.read_text() == before
    # A row that is gone is done again, and no other, to the same scores.
    lines = before.splitlines()
    path.write_text("\n".join([lines[0], lines[2]]) + "\n")
    assert app(*options).exit_code == 0
    again = read_rows(path)
    assert len(again) == 3
    assert (again[-1]["scores"], again[-1]["curve"]) == (rows[1]["scores"], rows[1]["curve"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("lm",), "expected of formal_languages, all, report, got lm"),
        (("formal_languages", "--only", "dyck"), "expected of (aa)*, parity, got dyck"),
        (("formal_languages", "--setting", "2"), "expected 0 to 1, got 2"),
        (("formal_languages", "--model", "gru"), "expected of lstm, attention, got gru"),
    ],
)
def test_wrong_names_are_refused_with_those_there_are(app, arguments, says):
    result = app(*arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())


def test_a_damaged_file_of_rows_is_named(app, tmp_path):
    (tmp_path / "small.jsonl").write_text('{"study": "small"}\n{"study": \n')
    result = app("formal_languages")
    assert result.exit_code == 2
    assert "line 2: not JSON" in " ".join(result.output.replace("│", " ").split())


def test_help_fits_80_columns():
    result = CliRunner().invoke(command.app, ["--help"], terminal_width=80)
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80


def test_tables_have_the_mean_and_the_range_of_the_best_setting(monkeypatch):
    best, worse = SMALL.settings["lstm"]
    scores = {0: (1.0, 0.5), 1: (1.0, 0.7)}
    rows = [row(Run("parity", "lstm", worse, 0), {"2-50": 0.5, "51-100": 0.5})]
    for seed, pair in scores.items():
        rows.append(row(Run("parity", "lstm", best, seed), dict(zip(("2-50", "51-100"), pair))))
    assert report.table(rows, SMALL, {"Hope": {"parity": (100.0, 98.5)}}).splitlines()[2:] == [
        "| LSTM | – | 100 / 60 (50–70) | 2 | 2 of 2 |",
        "| *published: Hope* | – | 100 / 98.5 |  |  |",
    ]


def test_the_page_has_what_the_rows_give():
    rows = report.rows_of(study.RESULTS, studies.STUDIES)
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.fill(page, report.blocks(rows)) == page
    assert report.fill(page, {"claims": "| other |"}) != page
    with pytest.raises(ValueError, match="expected one place for 'nothing', found 0"):
        report.fill(page, {"nothing": ""})


def test_a_report_of_quick_rows_is_a_page_and_pictures(tmp_path, monkeypatch):
    quick = {"formal_languages": SMALL}
    monkeypatch.setattr(report, "QUICK", quick)
    rows = [row(run, {"2-50": 1.0, "51-100": 0.5}) for run in remaining([], SMALL, ["parity"], ["lstm"])][:0]
    for setting in SMALL.settings["lstm"]:
        rows.append(row(Run("parity", "lstm", setting, 0), {"2-50": 1.0, "51-100": 0.5}))
    (tmp_path / "small.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    page, picture = report.write_report(tmp_path, quick=True)
    assert "| LSTM | – | 100 / 50 | 1 | 2 of 2 |" in page.read_text()
    assert picture.stat().st_size > 1000
