"""What all pictures share: style, colours, and the way to bytes that are the same every time."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.figure import Figure
from numpy.typing import NDArray

Array = NDArray[Any]
Colours = Mapping[int, str]
"""Label value -> #rrggbb."""

PALETTE = ("#e6550d", "#1f78b4", "#2ca25f", "#c51b8a", "#e6ab02", "#5e4fa2", "#17becf", "#a6761d", "#8c564b", "#66a61e")
INK = "#22303c"
FAINT = "#9aa5b1"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "medseg",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    # A label may be called "T1$".
    "text.parse_math": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e8ec",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
}

P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw with our style, untouched by the user's matplotlibrc."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            return draw(*args, **kwargs)

    return wrapper


def colours_for(values: Iterable[int], given: Mapping[int, str | None] | None = None) -> dict[int, str]:
    """Return a colour for every label value except 0: the one given, else the next of the palette."""
    chosen = {} if given is None else given
    foreground = [value for value in values if value != 0]
    return {v: chosen.get(v) or PALETTE[n % len(PALETTE)] for n, v in enumerate(foreground)}


def png(figure: Figure, *, dpi: int = 110) -> bytes:
    """Return the figure as a PNG without a date or a version in it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure) -> str:
    """Return the figure as an SVG whose letters are paths, so that it looks the same everywhere."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
