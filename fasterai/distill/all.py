"""Learning from a dense network: `from fasterai.distill.all import *`."""

from .callback import *
from .losses import *
