"""What jobs have reached, and medians and ranges over their seeds."""

import math

from tests.helpers.groups import FAILED, REFUSED, group, run, write_run
from train.runs.summary import Summary
from train.studies import results
from train.studies.plan import Planned
from train.studies.results import is_learnt, speedup, speedups, spread, steps_to
from train.studies.runner import Outcome

BASELINE = {10: 0.2, 20: 0.7, 30: 0.9, 40: 0.9, 50: 0.8}
FAST, SLOW, NEVER = {10: 0.8, 20: 0.9, 30: 0.95}, {50: 0.5, 60: 0.91}, {10: 0.3, 20: 0.89}
AT_ONCE = {10: 0.9, 20: 0.8}


def curve(points):
    return list(points.items())


def test_a_run_is_what_its_files_say_and_only_a_finished_one_has_a_final_accuracy(make_config):
    config = make_config(inspect=True)
    write_run(config, {10: 0.5, 20: 0.75}, inspections=[{"step": 0, "loss": 2.5}])
    summary = Summary("finished", test_accuracy=0.7, wall_seconds=3.0)
    read = results.read(Planned("name", {"seed": 0}, config), Outcome("finished", summary, None, 0))
    assert (read.name, read.values, read.config, read.classes) == ("name", {"seed": 0}, config, 7)
    assert read.curve == [(10, 0.5), (20, 0.75)] and read.final == 0.75
    assert (read.validated, read.wall_seconds) == (0.7, 3.0)
    assert read.inspections == [{"step": 0, "loss": 2.5}]
    for status in ("failed", "stopped"):
        other = results.read(Planned("name", {}, config), Outcome(status, None, None, 1))
        assert (other.curve, other.final, other.wall_seconds) == (read.curve, None, None), status


def test_refused_job_or_one_that_failed_before_its_data_has_nothing(make_config):
    config = make_config()
    failed = results.read(Planned("name", {}, config), Outcome("failed", None, "out of memory", 1))
    write_run(config, {10: 0.5})  # another job's
    refused = results.read(Planned("name", {}, config), Outcome("refused", None, "holds another job", 2))
    for read in (failed, refused):
        assert (read.classes, read.metrics, read.inspections, read.final) == (None, [], [], None)


def test_runs_of_one_name_are_a_group_in_the_order_of_their_first():
    groups = results.group([run(name=name, seed=seed) for seed, name in enumerate("babca")])
    assert [(job.name, job.position, job.config.seed) for job in groups] == [
        ("b", 0, 0),
        ("a", 1, 1),
        ("c", 2, 3),
    ]
    assert [[each.config.seed for each in job.runs] for job in groups] == [[0, 2], [1, 4], [3]]


def test_steps_and_speedups_are_to_the_best_of_the_baseline():
    for other, steps, times in ((BASELINE, 30, 1), (FAST, 20, 1.5), (SLOW, 60, 0.5), (NEVER, None, None)):
        assert steps_to(curve(other), 0.9) == steps
        assert speedup(curve(other), curve(BASELINE)) == times
    # When a baseline that is best at its first evaluation came there is not known.
    for baseline in (AT_ONCE, {10: 0.9, 20: 0.9}, {10: 0.1}, {}):
        assert speedup(curve(FAST), curve(baseline)) is None, baseline
    assert (
        speedup([], curve(BASELINE)) is results.steps_to_best_of([(1, 1)], []) is results.best_of([]) is None
    )


def test_what_was_not_reached_is_the_worst_of_a_spread():
    for values, found in (
        ([3.0, 1.0, 2.0], (2.0, 1.0, 3.0)),
        ([1.0, 2.0], (1.5, 1.0, 2.0)),
        ([5.0, None, 1.0], (5.0, 1.0, None)),
        ([None, None, 1.0], (None, 1.0, None)),
        ([1.0, None], (None, 1.0, None)),  # no median of one seed and nothing
        ([], (None, None, None)),
    ):
        assert spread(values, worst=math.inf) == found, values
    assert spread([3.0, None], worst=0) == (None, None, 3.0)


def test_speedups_are_seed_by_seed_without_those_that_cannot_be_measured():
    baseline = group("plain", BASELINE, BASELINE, BASELINE, AT_ONCE, REFUSED)
    assert speedups(group("bn", FAST, NEVER, BASELINE, FAST, FAST), baseline) == (1, None, 1.5)
    assert speedups(group("bn", FAST), group("plain", AT_ONCE)) == (None, None, None)


def test_learning_is_to_be_clearly_better_than_guessing_with_the_median_seed():
    for classes, guessed in ((10, 0.2), (2, 0.75), (100, 0.02)):
        assert not is_learnt(guessed, classes) and is_learnt(guessed + 0.001, classes)
        assert group("bn", {10: guessed + 0.001, 20: 0.0}, classes=classes).learns
        assert not group("bn", {10: guessed}, classes=classes).learns
    job = group("bn", {10: 0.9, 20: 0.5}, FAILED | {"curve": {10: 0.8}}, {10: 0.7}, REFUSED, {10: 0.6})
    assert job.best == (0.7, None, 0.9) and job.final == (0.5, None, 0.7) and job.learns
    for curves in ([{10: 0.9}, {10: 0.1}, {10: 0.1}], [REFUSED], [FAILED]):
        assert not group("bn", *curves).learns


def test_numbers_are_learnt_if_r2_is_clearly_above_that_of_their_mean():
    assert not is_learnt(0.1, 0) and is_learnt(0.11, 0)
    job = group("bn", {10: 0.25, 20: 0.125}, loss="squared_error", classes=0)
    assert job.learns and job.best.median == 0.25 and job.runs[0].validated == 0.24
    assert (job.runs[0].headline, job.headline) == ("r2", "R^2")
