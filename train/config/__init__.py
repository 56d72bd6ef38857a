"""The job: its keys, their ranges, and how a TOML file and flags become one."""

from train.config.checks import check as check
from train.config.checks import check_text as check_text
from train.config.files import CONFIGS as CONFIGS
from train.config.files import closest_config as closest_config
from train.config.files import load as load
from train.config.parsing import parse as parse
from train.config.schema import OF_NUMBERS as OF_NUMBERS
from train.config.schema import Config as Config
from train.config.schema import Data as Data
from train.config.schema import DataName as DataName
from train.config.schema import LossName as LossName
from train.config.schema import Model as Model
from train.config.schema import NetworkName as NetworkName
from train.config.schema import NormName as NormName
from train.config.schema import Optimizer as Optimizer
from train.config.schema import RenderingName as RenderingName
from train.config.values import NOT_COMPARED as NOT_COMPARED
from train.config.values import differences as differences
from train.config.values import flatten as flatten
from train.config.values import total_steps as total_steps
