"""The drawing of the idea in the README: ``python -m tools.drawing`` writes docs/images/idea.png."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OUTPUT = Path(__file__).resolve().parent.parent / "docs/images/idea.png"
MEMORY, FAST, MEDIUM, SLOW, LINE = "#3b6fb5", "#d9712b", "#c79a2d", "#5a8f4e", "#555555"


def box(
    axes, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 10
) -> None:
    patch = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.08", facecolor=color, edgecolor="none"
    )
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, color="white", ha="center", va="center", fontsize=size)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, **style) -> None:
    shape = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            connectionstyle=shape,
            arrowstyle="-|>",
            mutation_scale=11,
            color=style.get("color", LINE),
            linewidth=style.get("width", 1.3),
        )
    )


def draw() -> None:
    figure, axes = plt.subplots(figsize=(10.4, 3.3), dpi=200)
    axes.set(xlim=(0, 10.4), ylim=(0.3, 3.5))
    axes.axis("off")

    axes.text(0.42, 2.02, "token", ha="center", va="center", fontsize=11)
    arrow(axes, (0.8, 2.02), (1.35, 2.02))

    axes.text(2.95, 3.28, "five memories write one another", ha="center", fontsize=11, weight="bold")
    rows = [("key", 2.62), ("value", 2.12), ("rate", 1.62), ("retention", 1.12)]
    for name, y in rows:
        box(axes, 1.45, y, 1.15, 0.38, name, MEMORY)
        arrow(axes, (2.64, y + 0.19), (3.42, 2.06 + 0.12 * (y - 1.87)), color=MEMORY)
        arrow(axes, (1.46, y + 0.3), (1.46, y + 0.06), bend=1.5, color=MEMORY, width=1.0)
    box(axes, 3.5, 1.62, 1.05, 0.88, "memory\nthat is\nread", MEMORY)
    arrow(axes, (4.56, 2.4), (4.56, 1.75), bend=-1.3, color=MEMORY, width=1.0)
    axes.text(
        2.95, 0.62, "every few tokens each makes its own targets\nand learns them: W ← αW − η(Wk)kᵀ − ηδkᵀ"
        , ha="center", va="center", fontsize=9, color=LINE,
    )  # fmt: skip
    arrow(axes, (5.0, 2.06), (5.45, 2.06))

    axes.text(7.35, 3.28, "a continuum of MLPs at three speeds", ha="center", fontsize=11, weight="bold")
    levels = [
        ("learns every 32 tokens", "this page", FAST, 2.45),
        ("every 512", "this document", MEDIUM, 1.87),
        ("every 8,192", "this project", SLOW, 1.29),
    ]
    for text, keeps, color, y in levels:
        box(axes, 5.55, y, 2.35, 0.42, text, color)
        axes.text(8.05, y + 0.21, keeps, va="center", fontsize=9.5, color=color)
    for upper, lower in ((2.45, 2.29), (1.87, 1.71)):
        arrow(axes, (6.72, upper), (6.72, lower + 0.02), width=1.0)
    axes.text(6.72, 0.62, "fast ones adapt, slow ones keep", ha="center", va="center", fontsize=9, color=LINE)
    arrow(axes, (9.3, 2.06), (9.7, 2.06))
    axes.text(10.05, 2.06, "next\ntoken", ha="center", va="center", fontsize=10)

    figure.savefig(OUTPUT, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    print(OUTPUT)


if __name__ == "__main__":
    draw()
