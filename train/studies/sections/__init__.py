"""The sections of a report: a claim each about batch normalization, and what the jobs showed of it.

Each has `section(groups)`; the first group is the baseline. It returns None where the runs have nothing to
show. A section is one table, one or two charts and at most two sentences, all of them computed.
"""

from train.studies.sections import covariate_shift, evaluation_gap, linear_regime, smoothness, training_speed

CLAIMS = (training_speed, covariate_shift, linear_regime, smoothness, evaluation_gap)
