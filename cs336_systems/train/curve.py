"""The losses of a run as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cs336_systems.train.atomic import replacing

# Source: Okabe and Ito, "Color Universal Design".
_TRAINING, _VALIDATION = "#0072B2", "#D55E00"


def draw_curve(lines: Sequence[dict[str, Any]], path: Path, title: str, guessing: float) -> None:
    """Draw the losses in a log's lines; `guessing` is the loss of a model that knows nothing.

    Raises: UsageError when the disk refuses.
    """
    with matplotlib.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        # A line's mean over its steps: batches differ more than the model does.
        steps, losses = _points(lines, "mean_loss")
        axes.plot(steps, losses, color=_TRAINING, linewidth=1.2, label="training")
        steps, losses = _points(lines, "validation_loss")
        axes.plot(steps, losses, "o-", color=_VALIDATION, markersize=4, label=_named(losses))
        axes.axhline(guessing, color="#8C8C8C", linestyle=":", label=f"guessing {guessing:.2f}")
        axes.set(title=title, xlabel="step", ylabel="cross-entropy (nats per token)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="upper right")  # where a falling loss is not
        FigureCanvasAgg(figure)
        with replacing(path) as file:
            figure.savefig(file, format="png")


def _points(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in found], [loss for _, loss in found]


def _named(losses: list[float]) -> str:
    if not losses:
        return "validation"
    last = losses[-1]
    return f"validation: {last:.3f} at the end (perplexity {math.exp(min(last, 700)):.3g})"
