"""Pictures as SVG elements inside a page, with its font and its colours, in light and dark."""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Of enough contrast on white and on near-black, and told apart with any colour vision: of calm ones those
# whose least distance (in Oklab, also as seen without red, green or blue cones) was the largest in a search.
COLORS = ("#0c6ccc", "#b43c00", "#189ca8", "#b48400", "#904890", "#e46084", "#a878e4", "#606c54")
STYLES = ("-", "--", ":", "-.")

INK = "#010203"  # stands for the page's own colour of text, as black does
SIZE = (4.6, 3.2)  # inches; on a phone of 360 pixels a point is about a pixel
STYLE = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "font.size": 11,
    "grid.alpha": 0.16,
    "grid.color": INK,
    "grid.linewidth": 0.7,
    "legend.fontsize": 10.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "xtick.labelsize": 10.5,
    "xtick.major.size": 3,
    "xtick.minor.size": 2,
    "ytick.color": INK,
    "ytick.labelsize": 10.5,
    "ytick.major.size": 3,
    "ytick.minor.size": 2,
}


UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff]")  # in XML
SHOWN = "\N{ZERO WIDTH SPACE}"  # before names, as matplotlib keeps to itself what begins with "_"


def color(index: int) -> str:
    """Returns the colour of the index-th of several things."""
    return COLORS[index % len(COLORS)]


def draw(describe: Callable[["Axes"], None], *, label: str) -> str:
    """Returns the SVG element of what `describe` draws into an axes; `label` says it to who cannot see it.

    Everything labelled is named in a legend below the axes, where it covers nothing.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.style import context
    from matplotlib.text import Text

    buffer = io.StringIO()
    label = UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", label)
    with context(["default", {**STYLE, "svg.hashsalt": label}]), warnings.catch_warnings():
        # The font is the reader's, not ours; and a picture of zeros on a logarithmic axis is empty.
        warnings.filterwarnings("ignore", message="Glyph|Data has no positive values")
        figure = Figure(figsize=SIZE, dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        describe(figure.subplots())
        _no_logarithm_of_nothing(figure)
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            _ticks(axis)
        for text in figure.findobj(Text):
            text.set_text(UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.get_text()))
        _legend(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date")))
    return _inline(buffer.getvalue(), label)


def line(
    axes: "Axes",
    x: Sequence[float],
    y: Sequence[float | None],
    *,
    name: str,
    index: int,
    low: Sequence[float | None] | None = None,
    high: Sequence[float | None] | None = None,
) -> None:
    """Draws the index-th of several lines, and what lies between `low` and `high` shaded; None is a gap."""
    import numpy as np

    style = STYLES[index // len(COLORS) % len(STYLES)]
    y = np.asarray(y, float)
    marker = "." if np.isfinite(y).sum() <= 20 else None  # or a point between two gaps would not be seen
    axes.plot(x, y, color=color(index), linestyle=style, marker=marker, label=SHOWN + name)
    if low is not None and high is not None:
        low, high = np.asarray(low, float), np.asarray(high, float)
        axes.fill_between(x, low, high, color=color(index), alpha=0.28, linewidth=0)


def histogram(
    axes: "Axes", edges: Sequence[float], counts: Sequence[float], *, name: str, index: int
) -> None:
    """Draws the index-th of several histograms: an outline over a light area."""
    axes.stairs(counts, edges, color=color(index), alpha=0.28, fill=True)
    style = STYLES[index // len(COLORS) % len(STYLES)]
    axes.stairs(counts, edges, color=color(index), linestyle=style, linewidth=1.4, label=SHOWN + name)


def level(axes: "Axes", y: float, *, name: str) -> None:
    """Draws a thin line across, at a value to compare with."""
    axes.axhline(y, color=INK, alpha=0.7, linestyle=(0, (4, 3)), linewidth=1, label=SHOWN + name)


def _no_logarithm_of_nothing(figure: "Figure") -> None:
    """Makes logarithmic axes linear on which there is nothing positive, for matplotlib cannot draw them."""
    for axes in figure.axes:
        for name, axis in (("xscale", axes.xaxis), ("yscale", axes.yaxis)):
            if axis.get_scale() == "log" and not math.isfinite(axis.get_minpos()):
                axes.set(**{name: "linear"})


def _ticks(axis: "Axis") -> None:
    """Makes room for the numbers on linear axes; writes 0.01 and 1e-05 on logarithmic ones, not TeX."""
    from matplotlib.ticker import AutoLocator, LogFormatter, LogFormatterMathtext

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}".replace("-", "\N{MINUS SIGN}") if super().__call__(x, pos) else ""

    if isinstance(axis.get_major_locator(), AutoLocator):
        axis.get_major_locator().set_params(nbins=5)
    transform = axis.get_transform()
    for which in ("major", "minor"):
        if isinstance(getattr(axis, f"get_{which}_formatter")(), LogFormatterMathtext):
            linthresh = getattr(transform, "linthresh", None)
            plain = Plain(transform.base, labelOnlyBase=which == "major", linthresh=linthresh)
            getattr(axis, f"set_{which}_formatter")(plain)


def _legend(figure: "Figure") -> None:
    """Names what is labelled below the axes, in as many columns as there is room for, and makes that room."""
    pairs = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels())]
    if not pairs:
        return
    handles, names = zip(*pairs)
    # Long names go on below, if possible where a part of theirs ends.
    names = [UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", " ".join(name.splitlines())) for name in names]
    names = ["\n".join(re.findall(r".{1,47}$|.{1,46}[ ,/]|.{47}", name)) for name in names]
    width, height = figure.get_size_inches()
    for columns in range(min(4, len(names)), 0, -1):
        legend = figure.legend(
            handles,
            names,
            loc="outside lower left",
            ncols=columns,
            frameon=False,
            handlelength=1.6,
            columnspacing=1.4,
            borderaxespad=0,
        )
        box = legend.get_window_extent()
        if columns == 1 or box.width <= width * figure.dpi:
            break
        legend.remove()
    figure.set_size_inches(width, height + box.height / figure.dpi)


def _inline(svg: str, label: str) -> str:
    """Returns matplotlib's SVG as an element of HTML: without hosts, fonts, black, and ids of others."""
    svg = svg.replace(SHOWN, "")
    prefix = f"p{hashlib.sha256(svg.encode() + label.encode()).hexdigest()[:10]}-"
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        parent[:] = [child for child in parent if not child.tag.endswith(("}metadata", "}style"))]
        if not parent.tag.endswith("}text"):
            parent.text = None
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None
        element.attrib = {
            key.rpartition("}")[2]: _attribute(key, value, prefix)
            for key, value in element.attrib.items()
            if key != "id" or value in used
        }
    root.attrib = {
        "viewBox": root.get("viewBox"),
        "role": "img",
        "aria-label": label,
        "fill": "currentColor",
        "stroke-linejoin": "round",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return prefix + value
    if key in ("d", "x", "y"):  # a hundredth of a point is enough
        rounded = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value)
        return " ".join(rounded.split())
    if key == "style":
        value = re.sub(r"font-family: [^;]*(; |$)", "", value)
        value = re.sub(f"{INK}|#000000", "currentColor", value)
    return re.sub(r"(^|url\()#(?=\w)", rf"\1#{prefix}", value)
