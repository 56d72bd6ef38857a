import re
from html import escape
from html.parser import HTMLParser

import pytest
from series_of import FAILED, REFUSED, inspected, line, run, series

from train.studies import report
from train.studies.sections import training_speed

SETTING = " All on digits, for 100 steps, in batches of 128."
ODD = 'a <b>&amp; "q" $x_1$ __y'
NOTHING = {
    **dict(units=[[None] * 3] * 3, movement=[None] * 2, histograms=[[None] * 64] * 2, slope=[None] * 2),
    **dict(loss=None, losses=[None] * 4, gradient_changes=[None] * 4, smoothness=None, identity_error=None),
    **dict(gradient_shift=[None] * 3, gradient_cosine=[None] * 3),
    **dict.fromkeys(("batch_statistics", "running_statistics"), {"loss": None, "accuracy": 0.1}),
}
CLAIMS = {claim.__name__.rpartition(".")[2]: claim for claim in report.CLAIMS}


class Page(HTMLParser):
    """Checks that every element ends where it should; gathers what those say that are in no picture."""

    def __init__(self, html):
        super().__init__()
        self.open, self.said, self.pictures = [], {}, 0
        self.feed(html)
        self.close()
        assert self.open == [] and html.startswith("<!DOCTYPE html>") and "NaN" not in html

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "wbr"):
            self.open.append(tag)
        if "svg" not in self.open:
            self.said.setdefault(tag, []).append("")
        self.pictures += tag == "svg"

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and "svg" not in self.open:
            self.said[self.open[-1]][-1] += data


def sentences(sections):
    return [sentence for section in sections if section for sentence in section.sentences]


@pytest.fixture(scope="module")
def compared():
    return [
        inspected(ODD, line(0), line(10), line(20), activation="sigmoid"),
        inspected("bn", line(0), line(10, smoothness=1.0), norm="batch", activation="tanh", rate=0.1),
        series("refused", REFUSED, norm="batch"),
        inspected("nothing", line(0, **NOTHING), line(10, **NOTHING), norm="batch", activation="relu"),
    ]


@pytest.fixture(scope="module")
def html(compared):
    return report.comparison(compared)


def test_comparison_has_each_claim_with_its_sentences_as_they_are(compared, html):
    page = Page(html)
    sections = [claim.section(compared) for claim in report.CLAIMS]
    assert page.said["h2"] == [section.title for section in sections] and len(sections) == 5
    intro, *told, footer = page.said["p"]
    assert told == sentences(sections) and len(told) > 10
    assert intro == f"The baseline is {ODD}; beside it bn, refused and nothing.{SETTING}"
    assert footer == (
        "Made from 4 runs, which took 6 seconds in all. Every sentence is computed from what was measured."
    )
    assert page.said["title"] == page.said["h1"] == [f"Comparison with {ODD}"]
    assert escape(ODD) in html and "<b>" not in html


def test_comparison_has_each_picture_and_each_cell(compared, html):
    page = Page(html)
    sections = [claim.section(compared) for claim in report.CLAIMS]
    assert page.said["figcaption"] == [picture.caption for each in sections for picture in each.pictures]
    assert page.pictures == len(page.said["figcaption"]) == 1 + (3 + 1) + 3 + 5 + 1
    assert page.said["td"] == [cell for each in sections for row in each.table.rows for cell in row[1:]]
    assert page.said["figcaption"][1] == f"{ODD}: median (thick), 15th and 85th percentile of the inputs."


def test_same_comparison_has_the_same_bytes(compared, html):
    assert report.comparison(compared) == html


def test_baseline_alone_is_a_comparison_of_which_more_is_to_come():
    page = Page(report.comparison([series("plain", {10: 0.5, 20: 0.9}, seconds=1234.5)]))
    assert page.said["p"] == [
        "The baseline is plain." + SETTING,
        "plain took 20 steps to its best accuracy, 0.9000.",
        "Made from 1 run, which took 1,234 seconds in all. Every sentence is computed from what "
        "was measured.",
    ]


def test_comparison_in_which_everything_is_refused_is_a_page_still():
    page = Page(report.comparison([series("plain", REFUSED), series("bn", REFUSED)]))
    assert page.said["h2"] == ["How fast it trains"] and page.pictures == 0
    assert page.said["p"][-1].startswith("Made from 2 runs, which took 3 seconds in all.")


def test_comparison_in_which_nothing_is_a_number_is_a_page_still():
    page = Page(report.comparison([inspected("nothing", line(0, **NOTHING), norm="batch")]))
    assert len(page.said["h2"]) == 5 and page.pictures == 10
    assert "nan" not in " ".join(page.said["p"] + page.said["td"]).lower()


def test_runs_of_which_nobody_took_the_time_took_none():
    page = Page(report.comparison([series("plain", REFUSED, seconds=None)]))
    assert "which took 0 seconds in all" in page.said["p"][-1]


def test_twelve_jobs_are_told_apart(monkeypatch):
    monkeypatch.setattr(report, "CLAIMS", (training_speed,))
    html = report.comparison([series(f"job {n}", {10: 0.5, 20: 0.8 + n / 100}) for n in range(12)])
    page = Page(html)
    assert len(page.said["tr"]) == 13 and page.pictures == 2
    looks = re.findall(r'style="fill: none; (stroke[^"]*)"', html)
    assert len({look for look in looks if "stroke: #" in look}) == 12


# Sweeps

RATE = "optimizer.learning_rate"


def sweep(*found, **options):
    points, runs = zip(*found)
    return report.sweep(options.get("title", "out"), points, runs)


def test_sweep_has_a_section_for_each_key_of_numbers_and_all_jobs():
    points = [
        {"model.norm": norm, RATE: rate, "seed": seed}
        for norm in ("batch", "none")
        for rate in (0.1, 1.0)
        for seed in (0, 1)
    ]
    runs = [
        run(
            {10: 0.5, 20: 0.9 - point[RATE] / 10},
            lines=[line(0), line(20)],
            norm=point["model.norm"],
            seed=point["seed"],
        )
        for point in points
    ]
    html = report.sweep(ODD, points, runs)
    page = Page(html)
    assert page.said["h1"] == [f"Sweep: {ODD}"] and escape(ODD) in html and page.pictures == 3
    assert page.said["h2"] == ["Over the learning rate", "Training and evaluation", "All jobs"]
    assert page.said["p"][0] == "8 jobs, over norm, learning rate and seed." + SETTING
    for norm in ("batch", "none"):
        assert (
            f"With norm = {norm} the best final test accuracy was 0.8900, at a learning rate of 0.1; it "
            "learnt at every value, and ended at 0.8000 at the worst."
        ) in page.said["p"]
    assert page.said["th"][-4:] == [
        f"norm = {norm}, learning rate = {rate}" for norm in ("batch", "none") for rate in (0.1, 1.0)
    ]
    assert report.sweep(ODD, points, runs) == html


@pytest.mark.parametrize(
    "points, jobs, intro, rows",
    [
        ([{}], [{"curve": {10: 0.9}}], "1 job.", ["out"]),
        ([{RATE: 0.1}], [{"curve": {10: 0.9}}], "1 job, over learning rate.", ["learning rate = 0.1"]),
        (
            [{"model.norm": "batch"}, {"model.norm": "none"}],
            [{"curve": {10: 0.9}}, FAILED],
            "2 jobs, over norm.",
            ["norm = batch", "norm = none"],
        ),
        ([{"seed": 0}, {"seed": 1}], [{"curve": {10: 0.9}}, REFUSED], "2 jobs, over seed.", ["out"]),
        (
            [{RATE: 0.1}, {RATE: 1}],
            [REFUSED] * 2,
            "2 jobs, over learning rate.",
            ["learning rate = 0.1", "learning rate = 1"],
        ),
    ],
)
def test_sweep_without_numbers_to_draw_is_a_table(points, jobs, intro, rows):
    page = Page(report.sweep("out", points, [run(**job) for job in jobs]))
    assert page.said["h2"] == ["All jobs"] and page.pictures == 0
    assert page.said["p"][0] == intro + SETTING and page.said["th"][4:] == rows


def test_sweep_of_failed_jobs_says_so_and_draws_nothing_but_axes():
    points, jobs = [{RATE: 0.1}, {RATE: 1.0}], [run(**FAILED, curve={10: 0.9})] * 2
    page = Page(report.sweep("out", points, jobs))
    assert page.said["p"][1] == "Here no job came to its end." and page.pictures == 2
    assert page.said["td"] == ["failed", "-", "0.9000"] * 2


@pytest.mark.parametrize("reached", [(1.0, 1.0), (1.0, 0.0), (0.9, 0.9)])
def test_sweep_draws_jobs_that_are_all_right_or_all_wrong(reached):
    points = [{RATE: 0.1}, {RATE: 1.0}]
    assert Page(report.sweep("out", points, [run({10: at}) for at in reached])).pictures == 2
