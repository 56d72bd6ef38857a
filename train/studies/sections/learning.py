"""Whether jobs have learnt, and how well."""

import math

from train.studies import statistics as comparison
from train.studies.sections.wording import accuracy, with_range
from train.studies.series import Series
from train.studies.statistics import Spread, best, spread


def best_accuracy(job: Series) -> Spread:
    """Returns the best test accuracy over the seeds."""
    return spread((reached and reached[1] for reached in map(best, job.curves)), worst=-math.inf)


def best_in_words(job: Series) -> str:
    """Writes the best test accuracy over the seeds that have one."""
    return with_range(spread((best(curve)[1] for curve in job.curves if curve), worst=-math.inf), accuracy)


def has_learnt(job: Series) -> bool:
    """Tells whether the median over the seeds is clearly better than guessing."""
    reached = best_accuracy(job).median
    return reached is not None and comparison.has_learnt(reached, job.classes)


def seeds_that_learnt(job: Series) -> int:
    """Returns with how many of its seeds a job has learnt."""
    bests = map(best, job.curves)
    return sum(reached is not None and comparison.has_learnt(reached[1], job.classes) for reached in bests)


def in_words(job: Series) -> str:
    """Says whether a job has learnt, or with how many of its seeds."""
    if not any(job.curves):
        return "has no result"
    learnt = seeds_that_learnt(job)
    return f"learnt with {learnt} of {len(job.runs)} seeds" if learnt else "did not learn"
