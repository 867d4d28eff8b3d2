"""The display: plain lines without a terminal."""

import io

from rich.console import Console

from nl_models.training.console import TrainingDisplay, duration


def test_plain_output_has_a_line_per_interval_and_one_at_the_end():
    out = io.StringIO()
    seconds = iter([0.0, 1.0, 12.0, 14.0])
    console = Console(file=out, force_terminal=False, width=40)
    with TrainingDisplay(console, steps=6, start=3, label="hope", clock=lambda: next(seconds)) as display:
        for step, loss in ((4, 3.0), (5, 2.5), (6, 2.0)):
            display.step(step, loss=loss, tokens_per_step=60)
        display.validation(loss=2.25, bits_per_byte=1.5, perplexity=9.49)
    assert out.getvalue().splitlines() == [
        "hope  step 5/6  loss 2.500  10 tokens/s  0:06 left",
        "hope  step 6/6  loss 2.000  13 tokens/s  0:00 left",
        "hope  step 6/6  validation loss 2.2500  1.500 bits/byte  perplexity 9.49",
    ]


def test_durations():
    assert [duration(s) for s in (0, 61.6, 3600)] == ["0:00", "1:02", "1:00:00"]
