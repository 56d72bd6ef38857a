"""The training step, evaluation, and the loop around them."""

from train.training.job import Job as Job
from train.training.job import prepare as prepare
from train.training.loop import fit as fit
from train.training.trained.evaluation import TrainedNetwork as TrainedNetwork
from train.training.trained.evaluation import TrainedRun as TrainedRun
from train.training.trained.evaluation import load_best as load_best
