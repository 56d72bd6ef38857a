"""Files -> a `Dataset` of splits, its preprocessing, and random changes to training images."""

from train.data.augment import augment as augment
from train.data.augment import check_augmentation as check_augmentation
from train.data.dataset import Dataset as Dataset
from train.data.dataset import Examples as Examples
from train.data.dataset import Labels as Labels
from train.data.dataset import Preprocessing as Preprocessing
from train.data.dataset import Split as Split
from train.data.dataset import eval_batches as eval_batches
from train.data.dataset import order as order
from train.data.dataset import steps_per_epoch as steps_per_epoch
from train.data.description import Description as Description
from train.data.loading import fingerprint as fingerprint
from train.data.loading import load as load
from train.data.loading import load_test as load_test
from train.data.renderings import check_renderings as check_renderings
from train.data.renderings import render as render
from train.data.renderings import render_mixed as render_mixed
