"""Charts of a report, light and dark. One test draws one; the others look at what axes are given."""

import base64
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from tests.helpers.groups import points
from train.studies import charts

NAMES = ["<b>&amp; $x_1$", "_x", "a\x1b\udc80--", "日本"]


def draw(axes):
    for index, name in enumerate(NAMES):
        charts.line(axes, [1, 10, 100], [3, None, 1], name=name, index=index)
    charts.logarithmic(axes)


def test_chart_is_an_image_for_light_pages_and_one_for_dark_ones_whatever_its_names():
    chart = charts.chart(draw, alt="what it shows", caption="its caption")
    assert chart[2:] == ("what it shows", "its caption")
    for uri, mode, other in ((chart.light, "light", "dark"), (chart.dark, "dark", "light")):
        kind, _, code = uri.partition(",")
        svg = base64.b64decode(code).decode()
        assert kind == "data:image/svg+xml;base64" and "<script" not in svg and 'href="http' not in svg
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert charts.INKS[mode] in svg and charts.INKS[other] not in svg
    with matplotlib.rc_context({"xtick.labelsize": 30}):  # the user's own settings
        assert charts._data_uri(draw, charts.INKS["light"]) == chart.light


def test_names_are_shown_as_they_are_in_a_legend_below_the_axes_and_inside_the_chart():
    several = ["norm = batch, learning rate = 0.1"] * 5
    for names in (NAMES[:3], ["a"], list("abcdefgh"), ["n" * 90] * 3, several, []):
        figure = Figure(figsize=charts.SIZE, dpi=72, layout="constrained")
        axes = figure.subplots()
        for index, name in enumerate(names):
            charts.line(axes, [0, 1], [0, 1], name=name, index=index)
        charts._add_legend(figure)
        figure.draw_without_rendering()
        assert axes.get_window_extent().height > 120 and len(figure.legends) == bool(names), names
        for legend in figure.legends:  # without names that begin with "_", if it has its way
            box = legend.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0, names
            assert box.y1 <= axes.get_tightbbox().y0, names
            shown = ["".join(text.get_text().split("\n"))[1:] for text in legend.texts]
            assert shown == [charts.plain(name)[1:] for name in names]
    assert [charts.plain(name)[1:] for name in NAMES] == [r"<b>&amp; \$x_1\$", "_x", "a��--", "日本"]


def test_range_is_shaded_and_none_is_a_gap():
    axes = Figure().subplots()
    charts.line(axes, [0, 1, 2], [1, None, 3], name="a", index=1, between=([0, None, 2], [2, None, 5]))
    charts.line(axes, range(30), range(30), name="long", index=0)
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [1, np.nan, 3])
    corners = {tuple(point) for path in axes.collections[0].get_paths() for point in path.vertices}
    assert corners == {(0, 0), (0, 2), (2, 2), (2, 5)} and axes.collections[0].get_alpha() < 0.5
    # Points between gaps have to be seen; those of long lines would hide it.
    assert [line.get_marker() for line in axes.lines] == [".", "None"]
    charts.level(axes, 7, name="target")
    assert points(axes)["target"] == [[0, 7], [1, 7]]


def test_axis_is_logarithmic_unless_nothing_is_positive():
    for values, scale in (
        ([0, 0.1], "log"),
        ([0, 0], "linear"),
        ([None, None], "linear"),
        ([-1, 0], "linear"),
    ):
        axes = Figure().subplots()
        charts.line(axes, [0, 1], values, name="a", index=0)
        charts.logarithmic(axes)
        assert (axes.get_yscale(), axes.get_xscale()) == (scale, "linear"), values


# Of red, green and blue in linear light, without red, green, or blue cones (Machado et al. 2009).
SEEN = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.052]],
    "no green": [[0.3673, 0.8606, -0.228], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "no blue": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}
TO_CONES = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.63]])
TO_OKLAB = np.array([[0.2105, 0.7936, -0.0041], [1.978, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])


def linear(color):
    channels = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def test_colours_are_distinct_with_any_colour_vision_and_of_contrast_in_light_and_dark():
    colors = np.array([linear(color) for color in charts.COLORS])
    for cones, seen in SEEN.items():
        lab = np.cbrt(np.clip(colors @ np.array(seen).T, 0, 1) @ TO_CONES.T) @ TO_OKLAB.T
        distances = np.linalg.norm(lab[:, None] - lab, axis=-1) + 9 * np.eye(len(lab))
        assert distances.min() > 0.08, cones
    luminance = lambda color: color @ [0.2126, 0.7152, 0.0722]
    for paper in map(linear, ("#ffffff", "#121212")):
        for color in colors:
            low, high = sorted((luminance(color), luminance(paper)))
            assert (high + 0.05) / (low + 0.05) >= 3, (color, paper)
    looks = [tuple(charts.style(index).values()) for index in range(33)]
    assert len(set(looks)) == 32 and looks[32] == looks[0]
