"""A config -> a `Network` of pure functions, in Flax Linen or NNX, with any normalization layer."""

from train.models.build import build as build
from train.models.build import build_pooling as build_pooling
from train.models.build import check as check
from train.models.frozen import learning as learning
from train.models.network import Network as Network
from train.models.network import Variables as Variables
from train.models.norms import NORMS as NORMS
from train.models.norms import NormKind as NormKind
from train.models.norms import running_rule as running_rule
