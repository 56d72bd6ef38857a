"""The training step, evaluation, and the loop around them."""

from train.training.evaluation import TrainedNetwork as TrainedNetwork
from train.training.evaluation import TrainedRun as TrainedRun
from train.training.evaluation import load_best as load_best
from train.training.job import Job as Job
from train.training.job import prepare as prepare
from train.training.loop import fit as fit
