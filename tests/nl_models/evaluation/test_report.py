"""Losses by position as table, plot and JSON."""

import io
import json

import pytest
import torch
from rich.console import Console

from nl_models.evaluation.generation import ConversationLosses, GenerationLosses
from nl_models.evaluation.position import PositionLosses
from nl_models.evaluation.report import (
    conversation_table,
    generation_table,
    plot_generation,
    plot_position,
    position_table,
    save_position,
)


@pytest.fixture
def losses():
    """Carried losses that rise by 1 nat each octave beyond a window of 512, to 64K tokens."""
    fresh = 3 + torch.linspace(-0.1, 0.1, 4)[:, None] * torch.ones(4, 65_536)
    rise = (torch.arange(65_536) / 512).clamp(min=1).log2()
    return PositionLosses(512, (0, 16_384, 32_768, 49_152), fresh + rise, fresh, fresh + 0.25)


@pytest.fixture
def within_the_window(losses):
    return PositionLosses(
        512, losses.starts, losses.carried[:, :512], losses.fresh, None, ("carried: why not",)
    )


def printed(table):
    file = io.StringIO()
    Console(file=file, width=80).print(table)
    return file.getvalue()


def test_the_table_fits_a_terminal_and_has_every_figure(losses):
    text = printed(position_table(losses))
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines() if "±" in line and "–" in line]
    assert [row[0] for row in rows][-2:] == ["16,384–32,768", "32,768–65,536"]
    bucket = losses.buckets()[-1]
    assert rows[-1][1:4] == [f"{bucket.carried:.3f}", "3.000", "3.250"]
    assert rows[-1][4:] == [f"+{bucket.difference:.3f}", "±", "0.000"]
    assert bucket.difference == pytest.approx(6.557, abs=1e-2)


def test_what_was_not_measured_is_a_dash_and_a_note(within_the_window):
    text = printed(position_table(within_the_window))
    last = next(line for line in text.splitlines() if "32,768–65,536" in line)
    assert last.split() == ["32,768–65,536", "–", "3.000", "–", "–"]
    assert "carried: why not" in text


def test_the_file_holds_every_figure(losses, within_the_window, tmp_path):
    for name, measured in (("a", losses), ("b", within_the_window)):
        save_position(tmp_path / name, about={"text": "prose"}, position=measured)
        read = json.loads((tmp_path / name).read_text())
        assert read["text"] == "prose"
        assert read["position"]["buckets"] == [vars(bucket) for bucket in measured.buckets()]
        assert (read["position"]["length"], read["position"]["window"]) == (65_536, 512)
        assert "generation" not in read


def test_what_it_wrote_is_saved_and_shown(tmp_path):
    generation = GenerationLosses(16, torch.arange(80).view(2, 40), torch.ones(2, 40))
    conversation = ConversationLosses(*(torch.full((2, 50), value) for value in (4.0, 3.0, 2.0, 0.5)))
    save_position(tmp_path / "x.json", about={}, generation=generation, conversation=conversation)
    read = json.loads((tmp_path / "x.json").read_text())
    assert read["generation"]["samples"][1][0] == 40
    assert read["conversation"]["turns"] == 50
    text = printed(generation_table(generation)) + printed(conversation_table(conversation))
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines()]
    assert ["16–32", "1.000", "±", "0.000", "1.00"] in rows
    assert ["33–50", "4.000", "3.000", "2.000", "0.50"] in rows
    assert plot_generation(generation, tmp_path / "x.png", title="x").stat().st_size > 5000


def test_the_plot_has_a_curve_for_each_loss(losses, within_the_window, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "nl_models.evaluation.report.save_figure", lambda figure, path: drawn.append(figure.axes[0])
    )
    plot_position(losses, tmp_path / "a.png", title="a")
    plot_position(within_the_window, tmp_path / "b.png", title="b")
    monkeypatch.undo()
    whole, cut = (
        {line.get_label(): line.get_xydata() for line in axis.lines if not line.get_label().startswith("_")}
        for axis in drawn
    )
    assert list(whole) == ["state carried", "fresh state every 512 tokens", "writes off"]
    places, values = whole["state carried"].T
    assert values[places < 512] == pytest.approx(3)
    assert values[-1] == pytest.approx(3 + 6.7, abs=0.1)
    assert list(cut) == ["state carried", "fresh state every 512 tokens"]
    assert cut["state carried"][:, 0].max() < 512
    assert drawn[0].get_xscale() == "log"
    assert plot_position(losses, tmp_path / "c.png", title="c").stat().st_size > 5000
