import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from train.studies import charts as pictures

ROOT = Path(__file__).parents[3]


def ids(svg):
    return re.findall(r'\bid="([^"]+)"', svg)


def references(svg):
    return re.findall(r'(?:url\(|href=")#([^)"]+)', svg)


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("text")]


def printed(program):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def busy(axes):
    pictures.line(axes, [1, 10, 100], [3, 2, 1], name="a", index=0, low=[2, 1, 0.5], high=[4, 3, 2])
    pictures.line(axes, [1, 10, 100], [1, None, 2], name="b", index=9)
    pictures.histogram(axes, [1, 5, 20], [2, 3], name="c", index=1)
    pictures.level(axes, 2.5, name="target")
    axes.plot([1, 50], [1, 3], color="black", marker="o", label="black")
    axes.text(1, 1, "written", color="k")
    axes.set(xlabel="step", ylabel="loss", xscale="log", title="title")


@pytest.fixture(scope="module")
def svg():
    return pictures.draw(busy, label="loss over steps")


def test_picture_is_one_element_that_the_page_sizes(svg):
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg" and not {"width", "height"} & set(root.attrib)
    left, top, width, height = map(float, root.get("viewBox").split())
    assert (left, top, width) == (0, 0, pytest.approx(4.6 * 72)) and 3.2 * 72 < height < 3.2 * 72 + 60
    assert root.get("role") == "img" and root.get("aria-label") == "loss over steps"


def test_picture_names_no_host_and_styles_nothing_outside_itself(svg):
    assert svg.startswith("<svg ") and svg.endswith("</svg>")
    assert not re.search("http|xmlns|<style|metadata|DOCTYPE", svg)


def test_text_is_text_in_the_font_of_the_page(svg):
    assert {"step", "loss", "title", "written", "a", "b", "c", "target", "black", "1", "10", "100"} <= set(
        texts(svg)
    )
    assert "font-family" not in svg and "DejaVu" not in svg


def test_text_can_be_read_on_a_phone(svg):
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
    assert min(sizes) * (360 - 2 * 16) / width >= 10


def test_all_but_the_palette_has_the_colour_of_the_page(svg):
    colours = set(re.findall(r"(?:fill|stroke)(?:: |=\")([^;\"]+)", svg))
    assert colours == {"none", "currentColor", pictures.color(0), pictures.color(1)}
    for element in ElementTree.fromstring(svg).iter("text"):
        assert "fill: currentColor" in element.get("style") or "fill" not in element.get("style")


def test_same_picture_has_the_same_bytes_in_every_process(svg):
    assert pictures.draw(busy, label="loss over steps") == svg
    told = printed(
        "from train.studies.charts import *; print(draw(lambda a: a.plot([1, 2], label='a'), label='b'))"
    )
    assert told == pictures.draw(lambda axes: axes.plot([1, 2], label="a"), label="b") + "\n"


def test_picture_does_not_depend_on_settings_of_the_user(svg):
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert pictures.draw(busy, label="loss over steps") == svg
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize("label, points", [("other", [3, 2, 1]), ("loss over steps", [3, 2, 1.5])])
def test_pictures_share_no_ids_on_a_page(svg, label, points):
    def describe(axes):
        busy(axes)
        axes.plot([1, 10, 100], points)

    other = pictures.draw(describe, label=label)
    together = ids(svg) + ids(other)
    assert len(ids(svg)) > 2 and len(set(together)) == len(together)
    for picture in (svg, other):
        assert set(references(picture)) == set(ids(picture))


@pytest.mark.parametrize("name", ["$x_1$", "a_b^c", "<b>&amp;", "_x", "\\frac", '"q"', "50 %", "日本", "${x"])
def test_text_is_shown_as_it_is_written(name):
    def describe(axes):
        pictures.line(axes, [0, 1], [0, 1], name=name, index=0)
        axes.set(xlabel=f"x {name}", ylabel=f"y {name}", title=f"t {name}")

    svg = pictures.draw(describe, label=name)
    assert {name, f"x {name}", f"y {name}", f"t {name}"} <= set(texts(svg))
    assert ElementTree.fromstring(svg).get("aria-label") == name


def test_name_may_hold_what_no_page_can():
    def describe(axes):
        pictures.line(axes, [0, 1], [0, 1], name="a\x1b\udc80", index=0)
        axes.set_xlabel("b\x00")

    svg = pictures.draw(describe, label="c\udc80")
    assert {"a��", "b�"} <= set(texts(svg)) and svg.encode()


def test_long_name_goes_on_where_a_part_of_it_ends():
    name = "model.norm=batch,optimizer.learning_rate=0.1,optimizer.weight_decay=0.0001"
    svg = pictures.draw(lambda axes: pictures.line(axes, [0], [0], name=name, index=0), label="")
    assert texts(svg)[-2:] == [
        "model.norm=batch,optimizer.learning_rate=0.1,",
        "optimizer.weight_decay=0.0001",
    ]


@pytest.mark.parametrize("names", [["a"], list("abcdefgh"), ["n" * 46] * 3, [f"seed {n}" for n in range(12)]])
def test_legend_lies_below_the_axes_inside_the_picture(names):
    def describe(axes):
        for index, name in enumerate(names):
            pictures.line(axes, [0, 1], [0, 1], name=name, index=index)
        axes.set_xlabel("step")

    root = ElementTree.fromstring(pictures.draw(describe, label=""))
    *_, width, height = map(float, root.get("viewBox").split())
    places = {text.text: (float(text.get("x")), float(text.get("y"))) for text in root.iter("text")}
    for name in names:
        x, y = places[name]
        assert places["step"][1] + 10 < y < height and 0 < x < width


def test_picture_without_names_has_no_legend():
    svg = pictures.draw(lambda axes: axes.plot([1, 2]), label="")
    assert 'viewBox="0 0 331.2 230.4"' in svg


def test_shaded_range_is_drawn_under_its_line_and_none_is_a_gap():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    pictures.line(axes, [0, 1, 2], [1, None, 3], name="a", index=1, low=[0, None, 2], high=[2, None, 5])
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [1, np.nan, 3])
    corners = {tuple(point) for path in axes.collections[0].get_paths() for point in path.vertices}
    assert {(0, 0), (0, 2), (2, 2), (2, 5)} == corners
    assert axes.lines[0].get_color() == pictures.color(1) and axes.collections[0].get_alpha() < 0.5


def test_histogram_has_its_counts():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    pictures.histogram(axes, [0, 1, 3], [5, 2], name="a", index=0)
    for patch in axes.patches:
        assert patch.get_data().values.tolist() == [5, 2] and patch.get_data().edges.tolist() == [0, 1, 3]


def test_colours_begin_again_with_another_style():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    count = len(pictures.COLORS)
    assert count >= 8 and len(set(pictures.COLORS)) == count
    for index in range(3 * count):
        pictures.line(axes, [0, 1], [0, 1], name="", index=index)
    looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
    assert len(set(looks)) == 3 * count
    assert [look[0] for look in looks] == 3 * list(pictures.COLORS)


def linear(colour):
    channels = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def luminance(colour):
    return linear(colour) @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("paper", ["#ffffff", "#121212"])
@pytest.mark.parametrize("colour", pictures.COLORS)
def test_colours_have_a_contrast_of_three_in_light_and_dark(colour, paper):
    low, high = sorted((luminance(colour), luminance(paper)))
    assert (high + 0.05) / (low + 0.05) >= 3


# Of red, green and blue in linear light, without red, green, or blue cones (Machado et al. 2009).
SEEN = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.052]],
    "no green": [[0.3673, 0.8606, -0.228], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "no blue": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}
TO_CONES = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.63]])
TO_OKLAB = np.array([[0.2105, 0.7936, -0.0041], [1.978, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])


@pytest.mark.parametrize("cones", SEEN)
def test_colours_are_told_apart_with_any_colour_vision(cones):
    channels = (
        np.array([[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in pictures.COLORS]) / 255
    )
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(SEEN[cones]).T, 0, 1)
    lab = np.cbrt(seen @ TO_CONES.T) @ TO_OKLAB.T
    distances = np.linalg.norm(lab[:, None] - lab, axis=-1) + 9 * np.eye(len(lab))
    assert distances.min() > 0.08


@pytest.mark.parametrize(
    "scale, low, high, wanted",
    [
        ("linear", 0, 1, {"0.0", "0.2", "0.4", "0.6", "0.8", "1.0"}),
        ("log", 1e-5, 1, {"1e−05", "0.0001", "0.001", "0.01", "0.1", "1"}),
        ("log", 2, 5, {"2", "3", "4"}),
        ("symlog", -100, 100, {"−100", "−10", "−1", "0", "1", "10", "100"}),
    ],
)
def test_numbers_on_axes_are_plain(scale, low, high, wanted):
    def describe(axes):
        axes.plot([low, high], [low, high])
        axes.set(xscale=scale, xlim=(low, high), yticks=[])

    shown = texts(pictures.draw(describe, label=""))
    assert wanted <= set(shown) and len(shown) <= 8


def test_help_does_not_wait_for_matplotlib():
    assert printed("import sys, train.pictures, train.page; print('matplotlib' in sys.modules)") == "False\n"
