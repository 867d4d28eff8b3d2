"""Each model has one colour in all pictures of the project."""

from matplotlib.colors import to_hex

import benchmarks.recall
import evaluations.report
import nl_models.plots
import nl_models.profiling.report
from evaluations.models import TITLES
from evaluations.study import Study
from evaluations.tasks.formal_languages import FormalLanguage
from nl_models.profiling.measure import Measurement

# What a training, the demo, a profile, an evaluation and a benchmark call the same model.
NAMES = {
    "hope": ("hope", "hope", "hope", "hope", "self_modifying_titans"),
    "titans": ("titans", None, "titans", "titans", "titans"),
    "delta": ("gated_delta_net", "gated-delta-net", "gated_delta_net", "gated_delta_net", "gated_delta_net"),
    "hope with attention": ("attention", "hope-attention", "hope-attention", "hope_attention", None),
    "transformer": (None, "transformer", "transformer", "attention", None),
}


def losses(names, folder):
    records = [{"kind": kind, "tokens": 8, "loss": 3.0} for kind in ("train", "validation")]
    nl_models.plots.plot_losses(dict.fromkeys(names, records), folder / "loss.png", title="t")


def profile(names, folder):
    points = [Measurement(name, "prefill", 9, "ok", 0.5, 2.0, 100, 50, 1) for name in names]
    nl_models.profiling.report.plot_profile(points, folder / "profile.png", title="t")


def study(names, folder):
    given = Study(
        name="small", tasks={"parity": FormalLanguage}, shape={}, training={"steps": 2},
        settings={name: [{}] for name in names}, seeds=(0,),
    )  # fmt: skip
    evaluations.report.draw("small", [], given, folder / "study.png")


def recall(names, folder):
    rows = [{"model": name, "pairs": 4, "curve": [(1, 3.0, 0.5)]} for name in names]
    benchmarks.recall.plot(rows, folder / "recall.png")


def test_a_model_has_one_colour_in_all_pictures(tmp_path, monkeypatch):
    figures = []
    for module in (nl_models.plots, nl_models.profiling.report, evaluations.report, benchmarks.recall):
        monkeypatch.setattr(module, "save_figure", lambda figure, path, **_: figures.append(figure))
    row = {"curve": [(1, 3.0, {"right": 0.5}), (2, 2.0, {"right": 0.7})]}
    monkeypatch.setattr(evaluations.report, "chosen", lambda *_: [row])
    found = {model: set() for model in NAMES}
    for number, draw in enumerate((losses, losses, profile, study, recall)):
        called = {model: names[number] for model, names in NAMES.items() if names[number] is not None}
        # In another order each time: a colour is not a place in a list.
        draw(sorted(called.values())[:: (-1) ** number], tmp_path)
        lines = [line for axes in figures.pop().axes for line in axes.lines]
        for model, name in called.items():
            label = TITLES[name] if draw is study else name
            colours = {to_hex(x.get_color()) for x in lines if x.get_label().split(" (")[0] == label}
            assert len(colours) == 1, (draw.__name__, model)
            found[model] |= colours
    assert all(len(colours) == 1 for colours in found.values()), found
    assert len(set.union(*found.values())) == len(NAMES)
