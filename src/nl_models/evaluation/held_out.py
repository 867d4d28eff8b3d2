"""Loss by position at the end of a training: measured, shown and saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from nl_models.evaluation.position import PositionLosses, loss_by_position
from nl_models.evaluation.report import plot_position, position_table, save_position
from nl_models.hope import HopeForCausalLM
from nl_models.profiling.report import describe_machine


def measure_held_out(
    model: HopeForCausalLM,
    held_out: np.ndarray,
    folder: Path,
    *,
    window: int,
    length: int,
    streams: int,
    console: Console,
    name: str,
) -> PositionLosses:
    """:func:`loss_by_position` in the first tokens of a held-out text.

    Prints the table and writes ``position.png`` and ``position.json``, the latter last.

    Args:
        model: trained on windows of ``window`` tokens.
        held_out: the text; at least one window.
        folder: of the files.
        window: of the fresh state.
        length: tokens to read; less where there is less.
        streams: rotations; no more than there are windows.
        console: for the progress and the table.
        name: of the model.
    """
    tokens = held_out[:length]
    losses = loss_by_position(
        model,
        tokens,
        window=window,
        streams=min(streams, len(tokens) // window),
        console=console,
        label=f"{name}  loss by position",
    )
    console.print(position_table(losses))
    plot_position(losses, folder / "position.png", title=f"{name}, by position in held-out text")
    about = {"model": name, "text": "held-out text", "machine": describe_machine(str(model.device))}
    save_position(folder / "position.json", about=about, position=losses)
    return losses
