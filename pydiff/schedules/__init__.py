"""Noise schedules, predictions and time grids: float64 on the host, numpy and nothing else."""

from pydiff.schedules.base import NoiseSchedule as NoiseSchedule
from pydiff.schedules.closed_form import EDM as EDM
from pydiff.schedules.closed_form import VE as VE
from pydiff.schedules.closed_form import DiscreteBetas as DiscreteBetas
from pydiff.schedules.closed_form import RectifiedFlow as RectifiedFlow
from pydiff.schedules.closed_form import VPCosine as VPCosine
from pydiff.schedules.closed_form import VPLinear as VPLinear
from pydiff.schedules.from_callable import FromLogSNR as FromLogSNR
from pydiff.schedules.from_config import from_diffusers_config as from_diffusers_config
from pydiff.schedules.prediction import EDMPrecond as EDMPrecond
from pydiff.schedules.prediction import Prediction as Prediction
from pydiff.schedules.prediction import get_prediction as get_prediction
from pydiff.schedules.time_grid import list_grids as list_grids
from pydiff.schedules.time_grid import make_times as make_times
