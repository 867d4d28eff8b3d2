"""The display: plain lines without a terminal."""

import io
import re

import pytest
from rich.console import Console

from nl_models import console
from nl_models.console import Display, duration


class Clock:
    def __init__(self, *seconds):
        self.monotonic = iter(seconds).__next__


def test_plain_output_has_a_line_per_interval_and_one_at_the_end(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(console, "time", Clock(0.0, 1.0, 12.0, 14.0))
    shown = Console(file=out, force_terminal=False, width=40)
    with Display(shown, total=6, start=3, label="hope") as display:
        for step, loss in ((4, 3.0), (5, 2.5), (6, 2.0)):
            display.advance(1, f"loss {loss:.3f}", tokens=60, line=step == 6)
        display.note("validation 2.2500  1.500 bits/byte  ppl 9.49")
    assert out.getvalue().splitlines() == [
        "hope  5/6  loss 2.500  10 tokens/s  0:06 left",
        "hope  6/6  loss 2.000  13 tokens/s  0:00 left",
        "hope  6/6  validation 2.2500  1.500 bits/byte  ppl 9.49",
    ]


def test_durations():
    assert [duration(s) for s in (0, 61.6, 3600)] == ["0:00", "1:02", "1:00:00"]


@pytest.mark.parametrize("terminal", [True, False])
def test_everything_fits_80_columns(terminal, monkeypatch):
    """The demo's longest name, a long run and a start at random weights."""
    out = io.StringIO()
    monkeypatch.setattr(console, "time", Clock(0.0, 100.0))
    shown = Console(file=out, force_terminal=terminal, width=80, color_system=None)
    with Display(shown, total=100000, start=99998, label="hope-attention") as display:
        display.advance(1, "loss 11.250", tokens=12345600)
        display.note("validation 1.2500  10.500 bits/byte  ppl 1.2e+300")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).replace("\r", "\n")
    assert max(map(len, text.splitlines())) <= 80
    assert "ppl 1.2e+300" in text
    if terminal:
        assert "hope-attention" in text
        assert "99999/100000 loss 11.250  123,456 tokens/s  1:40 left" in text
