"""Charts of a report: drawn by matplotlib, once for light pages and once for dark ones."""

import base64
import io
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of enough contrast on white and on near-black, and distinct with any colour vision: of muted ones those
# whose least distance (in Oklab, also as seen without red, green or blue cones) was the largest in a search.
COLORS = ("#0c6ccc", "#b43c00", "#189ca8", "#b48400", "#904890", "#e46084", "#a878e4", "#606c54")
STYLES = ("-", "--", ":", "-.")
INKS = {"light": "#1d2126", "dark": "#e3e5e8"}  # the page's colours of text, in style.css
SIZE = (4.6, 3.2)  # inches, without the legend; on a phone a point is then about a pixel
STYLE = {
    "axes.grid": True,
    "axes.labelsize": 11,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 72,
    "font.size": 10.5,
    "grid.alpha": 0.16,
    "legend.borderaxespad": 0,
    "legend.columnspacing": 1.4,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "svg.hashsalt": "jbn",
}
_INKED = ("axes.edgecolor", "axes.labelcolor", "grid.color", "text.color", "xtick.color", "ytick.color")


class Chart(NamedTuple):
    light: str  # a data URI
    dark: str
    alt: str  # what it shows, for those who cannot see it
    caption: str


def chart(draw: Callable[["Axes"], None], *, alt: str, caption: str) -> Chart:
    """Return the chart that `draw` draws into an axes. What is labelled is named in a legend below it."""
    return Chart(_data_uri(draw, INKS["light"]), _data_uri(draw, INKS["dark"]), alt, caption)


def _data_uri(draw: Callable[["Axes"], None], ink: str) -> str:
    from matplotlib.figure import Figure
    from matplotlib.style import context

    buffer = io.BytesIO()
    style: Any = STYLE | dict.fromkeys(_INKED, ink)
    with context(["default", style]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # names may have letters that the font lacks
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.subplots())
        _add_legend(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _add_legend(figure: "Figure") -> None:
    """Add a legend below the axes, in as many columns as there is room for, and the room that it takes."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    names = ["\n".join(textwrap.wrap(name, 46)) for name in names]
    for columns in range(min(3, len(names)), 0, -1):
        legend = figure.legend(handles, names, loc="outside lower left", ncols=columns)
        box = legend.get_window_extent()
        if columns == 1 or box.width <= SIZE[0] * figure.dpi:
            figure.set_figheight(SIZE[1] + box.height / figure.dpi)
            break
        legend.remove()


def plain(name: str) -> str:
    """Return a name that matplotlib shows as it is, also where it has a dollar, or begins with "_"."""
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return "\N{ZERO WIDTH SPACE}" + printable.replace("$", r"\$")


def style(index: int) -> dict[str, Any]:
    """Return the colour and line style of the index-th of several things."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": STYLES[index // len(COLORS) % len(STYLES)]}


def line(
    axes: "Axes",
    x: Sequence[float],
    y: Sequence[float | None],
    *,
    name: str,
    index: int,
    between: tuple[Sequence[float | None], Sequence[float | None]] | None = None,
) -> None:
    """Draw the index-th of several lines, and the range that it is the median of shaded; None is a gap."""
    values = np.asarray(y, float)
    marker = "." if np.isfinite(values).sum() <= 20 else None  # or a point between two gaps would not be seen
    axes.plot(x, values, marker=marker, label=plain(name), **style(index))
    if between is not None:
        low, high = (np.asarray(edge, float) for edge in between)
        axes.fill_between(x, low, high, color=style(index)["color"], alpha=0.2, linewidth=0)


def level(axes: "Axes", y: float, *, name: str) -> None:
    """Draw a thin line across, at a value to compare with."""
    ink = axes.xaxis.label.get_color()
    axes.axhline(y, color=ink, alpha=0.7, linestyle=(0, (4, 3)), linewidth=1, label=plain(name))


def logarithmic(axes: "Axes", which: str = "y") -> None:
    """Make an axis logarithmic, unless nothing on it is positive."""
    if np.isfinite(getattr(axes, f"{which}axis").get_minpos()):
        axes.set(**{f"{which}scale": "log"})
