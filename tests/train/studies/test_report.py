"""The page of a study, its files of numbers, and what the terminal shows, of jobs made from plain numbers."""

import dataclasses
import re
import signal
from html.parser import HTMLParser

import pytest

from tests.helpers.command import ROOT
from tests.helpers.groups import (
    FAILED,
    NOTHING,
    REFUSED,
    colors,
    group,
    inspected,
    line,
    run,
    undrawn,
    write_run,
)
from train.__main__ import main
from train.errors import RunFailed, UserError
from train.runs.files import read_json
from train.runs.summary import Summary
from train.studies import charts, report, runner
from train.studies.charts import Chart
from train.studies.sections import CLAIMS, sweep
from train.studies.sections.section import Section

ODD = "a <b>&amp; \"q\" 'p' $x_1$ 日本"
RATE = "optimizer.learning_rate"


class Page(HTMLParser):
    """Checks that every element ends where it should; gathers what elements there are and what they say."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.said = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == [] and text.startswith("<!DOCTYPE html>") and "nan" not in text.lower()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "wbr", "source", "img"):
            self.open.append(tag)
            self.said.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.said[self.open[-1]][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def section(text):
    chart = Chart("data:light", "data:dark", text, text)
    return Section(text, (text,) * 2, (chart,), (text, text), ((text, text),) * 2)


def claims(*groups):
    return [found for claim in CLAIMS if (found := claim.section(groups))]


def test_page_shows_every_text_as_it_is_written():
    page = Page(report.render(ODD, ODD, [section(ODD)] * 3, ODD))
    for tag, count in dict(title=1, h1=1, p=8, h2=3, a=3, figcaption=3, th=12, td=6).items():
        assert page.said[tag] == [ODD] * count, tag
    assert [image["alt"] for image in page.all("img")] == [ODD] * 3


def test_page_needs_nothing_else_and_runs_nothing():
    html = report.render("title", "intro", [section("a/b,c_d")] * 3, "footer")
    page = Page(html)
    assert not re.search(r"https?:|//|@import|@font-face|url\(", html)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object"})
    assert {image["src"] for image in page.all("img")} == {"data:light"}
    dark = {"media": "screen and (prefers-color-scheme: dark)", "srcset": "data:dark"}
    assert page.all("source") == [dark] * 3 and f"@media {dark['media']}" in html and "@media print" in html
    assert any("default-src 'none'; img-src data:" in meta.get("content", "") for meta in page.all("meta"))


def test_what_is_referred_to_exists_and_tables_can_be_reached_by_keyboard():
    for count, links in ((2, 0), (3, 3)):
        page = Page(report.render("", "", [section(f"{n}") for n in range(count)], ""))
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids)) == count
        assert [link["href"] for link in page.all("a")] == [f"#{id}" for id in ids[:links]]
        assert {each["aria-labelledby"] for _, each in page.elements if "aria-labelledby" in each} == set(ids)
        boxes = [box for box in page.all("div") if box["class"] == "scroll"]
        assert [(box["role"], box["tabindex"]) for box in boxes] == [("region", "0")] * count


def test_claim_is_a_table_a_chart_or_two_and_two_sentences_at_most(monkeypatch):
    undrawn(monkeypatch)
    plain = inspected(ODD, line(0), line(10, loss=1.5), line(20), activation="sigmoid")
    bn = inspected("bn", line(0), line(10, loss=1.0), norm="batch", activation="tanh", position=1)
    nothing = inspected("none", line(0, **NOTHING), line(10, **NOTHING), norm="batch", position=2)
    for groups in ([plain, bn, group("refused", REFUSED), nothing], [nothing, plain], [nothing]):
        sections = claims(*groups)
        assert len(sections) == 5
        for each in sections:
            assert len(each.sentences) <= 2 and 1 <= len(each.charts) <= 2
            assert each.rows and {len(row) for row in each.rows} == {len(each.header)}
        page = Page(report.render("title", "intro", sections, "footer"))
        assert page.said["p"] == ["intro", *(text for each in sections for text in each.sentences), "footer"]
        assert page.said["td"] == [cell for each in sections for row in each.rows for cell in row[1:]]
    untrained = inspected("a", line(0), norm="batch")
    assert [each.title for each in claims(untrained, group("b", REFUSED))] == ["How fast it trains"]


def test_name_keeps_its_colour_on_the_whole_page(monkeypatch):
    drawn, places = undrawn(monkeypatch), {"a": 1, "b": 2, "c": 3}
    jobs = [inspected(name, line(0), line(10), norm="batch", position=at) for name, at in places.items()]
    claims(group("not inspected", {10: 0.9}), *jobs)
    assert len(drawn) == 8
    for alt, axes in drawn.items():
        found = colors(axes)
        assert {name: found[name] for name in places} == {n: charts.COLORS[at] for n, at in places.items()}, (
            alt
        )
    drawn.clear()
    values = [{"model.norm": norm, RATE: rate} for norm in ("batch", "ghost") for rate in (0.1, 1.0)]
    lines = [line(0), line(10)]
    runs = [run({10: 0.9}, name=f"{each}", values=each, lines=lines, norm="ghost") for each in values]
    sweep.sections(report.group(runs))
    accuracy, error, gap = (colors(axes) for axes in drawn.values())
    assert accuracy == error and not set(error.values()) & set(gap.values())


def test_comparison_json_has_an_object_a_job_of_medians_and_seeds():
    plain = group("plain", {10: 0.2, 30: 0.9}, {10: 0.3, 20: 0.8})
    bn = group("bn", {10: 0.8, 15: 0.95}, {10: 0.9, 20: 0.9}, seconds=4.0, norm="batch")
    never = group("never", {10: 0.1}, FAILED, seconds=None)
    baseline, other, last = report.entries([plain, bn, never])
    keys = ["name", "best_test_accuracy", "steps_to_target", "speedup"]
    assert list(other)[:4] == keys and list(other.values())[:4] == ["bn", pytest.approx(0.925), 12.5, 2.0]
    assert other["ranges"]["steps_to_target"] == [10, 15] and other["wall_seconds"] == 4.0
    assert other["speedup_over"] == {"plain": 2.0, "bn": 1.0, "never": None}
    assert other["seeds"][0] == {
        **{"seed": 0, "run_dir": "unused", "status": "finished", "error": None, "test_accuracy": 0.94},
        **{"best_test_accuracy": 0.95, "steps_to_target": 15, "speedup": 2.0, "wall_seconds": 4.0},
    }
    assert (baseline["steps_to_target"], baseline["speedup"]) == (25, 1)
    assert [last[key] for key in keys] == ["never", None, None, None]
    assert last["seeds"][1]["error"] == FAILED["error"]


def test_comparison_json_of_numbers_has_r2_beside_accuracies_that_are_null():
    numbers = {"loss": "squared_error", "classes": 0}
    (_, other) = report.entries([group(n, {10: 0.2, 20: 0.5}, **numbers) for n in "ab"])
    assert (other["best_test_accuracy"], other["best_test_r2"]) == (None, 0.5)
    assert other["ranges"]["best_test_r2"] == [0.5, 0.5] and other["steps_to_target"] == 20
    (seed,) = other["seeds"]
    assert (seed["test_accuracy"], seed["best_test_accuracy"]) == (None, None)
    assert (seed["test_r2"], seed["best_test_r2"]) == (0.49, 0.5)
    footer = report._footer([run(**numbers)], True)
    assert "(best_test_r2)" in footer and "at which the loss on the validation split was lowest" in footer


def test_page_says_what_is_compared_and_what_its_accuracies_are():
    common = "All on digits, for 100 steps, in batches of 128"
    rates = [run(name=f"{rate}", values={RATE: rate, "seed": 0, "model.norm": "none"}) for rate in (1, 2)]
    for groups, compare, intro in (
        ([group("a", {})], True, f"The baseline is a. {common}."),
        (
            [group(n, {}, {}) for n in "abc"],
            True,
            f"The baseline is a; compared with it: b and c. {common}, with 2 seeds.",
        ),
        (report.group(rates), False, f"2 jobs over learning rate and norm. {common}."),
    ):
        assert " ".join(report._intro(groups, compare)) == intro
    a, b = run(name="a"), run(name="b")
    b = b._replace(config=dataclasses.replace(b.config, steps=None, epochs=3.0, batch_size=64))
    assert report._intro(report.group([a, b]), True)[1:] == ["All on digits."]
    runs = [run(seconds=1234.5), run(seed=1, status="refused", lines=[line(0)])]
    footer = report._footer(runs, True)
    for text in (
        "Made from 2 runs, which took 1,234 seconds in all. Every sentence is computed",
        "The best of the test curve (best_test_accuracy) is its maximum over all evaluations",
        "At the best validation is the test accuracy after best_step, at which the accuracy on the "
        "validation",
        "What was measured inside the networks is that of the first seed.",
    ):
        assert text in footer
    assert "first seed" not in report._footer(runs[1:], True)
    assert "best_step" not in report._footer(runs, False) and "first seed" not in report._footer(
        runs[:1], True
    )


# All of it, but for the training


@pytest.fixture
def study(monkeypatch, tmp_path, capsys):
    """Returns a function that runs a command in `tmp_path`, with curves, errors or stops by a norm.

    That returns the exit code, what was printed, the numbers and the page.
    """
    undrawn(monkeypatch)
    monkeypatch.chdir(ROOT)

    def study(words, **ends):
        def fit(config, stop):
            end = ends[config.model.norm]
            if isinstance(end, Exception):
                raise end
            if end == "stopped":
                stop.received = signal.SIGTERM
                return Summary("stopped", step=0)
            write_run(config, end)
            return Summary("finished", 20, 10, end[10], 0.5, max(end.values()), wall_seconds=1.5)

        monkeypatch.setattr(runner, "fit", fit)
        code = main([*words.split(), "--num-processes", "1", "--out", str(tmp_path)])
        (numbers,) = tmp_path.glob("*.json")
        return code, capsys.readouterr().out, read_json(numbers), (tmp_path / "report.html").read_text()

    return study


COMPARE = "compare configs/digits_mlp_without.toml configs/digits_mlp.toml --seeds 2"
NORMS = "sweep configs/digits_mlp.toml --model.norm none,batch,layer"
SLOW, FAST, IDLE = {10: 0.5, 20: 0.9}, {10: 0.95, 20: 0.9}, {10: 0.15, 20: 0.1}


def table(shown):
    return [" ".join(row.split()) for row in shown.splitlines() if row[:2] == "  " and row.strip()]


def test_comparison_writes_its_numbers_and_its_page_and_prints_a_table(study, tmp_path):
    code, shown, jobs, html = study(COMPARE, none=SLOW, batch=FAST)
    assert code == 0 and [(job["name"], job["speedup"]) for job in jobs] == [
        ("digits_mlp_without", 1),
        ("digits_mlp", 2),
    ]
    assert jobs[1]["seeds"][1]["run_dir"] == f"{tmp_path}/digits_mlp,seed=1"
    page = Page(html)
    assert page.said["h1"] == ["Comparison with digits_mlp_without"] and len(page.all("img")) == 2
    assert table(shown) == [
        "job best of the test curve steps to the baseline's best speed-up seconds ended",
        "digits_mlp_without 0.9000 20 1.0 1.50 finished",
        "digits_mlp 0.9500 10 2.0 1.50 finished",
    ]
    files = [f"Numbers: {tmp_path}/comparison.json", f"Report: {tmp_path}/report.html"]
    assert shown.splitlines()[-4:] == [*page.said["p"][1:3], *files]


def test_job_that_never_learnt_has_no_steps_to_a_target_in_the_terminal_or_on_the_page(study):
    _, shown, _, html = study(COMPARE, none=IDLE, batch=IDLE)
    assert table(shown)[1:] == [
        f"{name} 0.1500 - - 1.50 finished" for name in ("digits_mlp_without", "digits_mlp")
    ]
    assert Page(html).said["td"][4::8] == Page(html).said["td"][5::8] == ["-", "-"]
    assert "digits_mlp_without did not learn: its best test accuracy was 0.1500" in shown


def test_job_that_fails_or_is_refused_does_not_stop_the_rest(study, tmp_path):
    ends = dict(none=RunFailed("the loss of step 3 is not finite. Lower."), batch=UserError("no such data."))
    code, shown, (failed, refused, finished), html = study(NORMS, **ends, layer=FAST)
    assert code == 2 and [job["status"] for job in (failed, refused, finished)] == [
        "failed",
        "refused",
        "finished",
    ]
    assert (failed["model.norm"], failed["error"]) == ("none", "the loss of step 3 is not finite. Lower.")
    assert refused["error"] == "no such data." and refused["step"] is None
    assert (
        finished.items()
        >= {
            **{"model.norm": "layer", "run_dir": f"{tmp_path}/model.norm=layer", "error": None, "step": 20},
            **{
                "best_step": 10,
                "test_accuracy": 0.95,
                "test_loss": 0.5,
                "best_test_accuracy": 0.95,
                "wall_seconds": 1.5,
            },
        }.items()
    )
    said = ["failed: the loss of step 3 is not finite", "refused: no such data", "finished"]
    assert Page(html).said["td"][3::4] == said and table(shown)[1] == f"norm = none - - - {said[0]}"


def test_call_of_which_every_job_is_refused_leaves_what_an_earlier_one_wrote(study):
    _, _, *before = study(NORMS, none=SLOW, batch=FAST, layer=FAST)
    refused = dict.fromkeys(("none", "batch", "layer"), UserError("holds another job."))
    code, shown, *after = study(NORMS, **refused)
    assert code == 2 and "refused: holds another job" in shown and "Report" not in shown and after == before


def test_stop_says_how_to_go_on_until_all_are_finished(study):
    rest = "1 of 3 jobs have finished; the same line again goes on with the others."
    code, shown, jobs, html = study(NORMS, none=SLOW, batch="stopped", layer=FAST)
    assert code == 143 and rest in shown and rest in html
    assert [job["status"] for job in jobs] == ["finished", "stopped"]
    code, shown, jobs, html = study(NORMS, none=SLOW, batch=FAST, layer=FAST)
    assert code == 0 and len(jobs) == 3 and rest not in shown + html


def test_study_into_the_folder_of_another_is_refused_before_it_trains_and_one_that_grows_is_not(
    study, tmp_path, capsys
):
    ends = dict(none=SLOW, batch=FAST, layer=FAST, group=FAST)
    study("sweep configs/digits_mlp.toml --model.norm none,batch", **ends | {"batch": UserError("no such.")})
    held, names = (tmp_path / "results.json").read_text(), lambda jobs: [job["model.norm"] for job in jobs]

    def refused(words):
        before = (tmp_path / "results.json").read_text()
        code = main([*words.split(), "--num-processes", "1", "--out", str(tmp_path)])
        assert code == 2 and (tmp_path / "results.json").read_text() == before
        return capsys.readouterr().err

    assert refused("sweep configs/digits_mlp.toml --optimizer.learning-rate 0.1,1") == (
        f"error: --out = '{tmp_path}' holds another sweep, with model.norm=none, which this one does not "
        "have; give another --out, or its values, configs and seeds too, to go on with it.\n"
    )
    assert f"--out = '{tmp_path}' holds a sweep; give another --out for this comparison." in refused(COMPARE)
    # What was refused has left nothing that could be lost; more values and more seeds may come.
    _, _, jobs, _ = study("sweep configs/digits_mlp.toml --model.norm none,layer", **ends)
    assert names(jobs) == ["none", "layer"]
    _, _, jobs, _ = study(f"{NORMS},group --seeds 2", **ends)
    assert len(jobs) == 8
    assert "with model.norm=batch,seed=1 and 3 more, which" in refused(f"{NORMS},group")
    for spoilt in (held[:20], "{}", "[3]", '[{"run_dir": 3, "status": "finished"}]', "null"):
        (tmp_path / "results.json").write_text(spoilt)
        report.check_folder(tmp_path, [], compare=False)
    (tmp_path / "results.json").write_text(held)
    with pytest.raises(UserError):
        report.check_folder(tmp_path, [], compare=False)


def test_comparison_grows_by_configs_and_seeds_and_is_not_replaced_by_another(study, tmp_path, capsys):
    study(COMPARE.removesuffix(" --seeds 2"), none=SLOW, batch=FAST)
    _, _, jobs, _ = study(
        COMPARE.replace(" --seeds", " configs/raw_inputs.toml --seeds"), none=SLOW, batch=FAST
    )
    assert [len(job["seeds"]) for job in jobs] == [2, 2, 2]
    code = main([*COMPARE.split(), "--num-processes", "1", "--out", str(tmp_path)])
    assert code == 2 and "holds another comparison, with raw_inputs and 1 more, which" in (
        capsys.readouterr().err
    )
