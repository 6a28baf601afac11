"""Penalties on groups of weights: `from fasterai.regularize.all import *`."""

from .callback import *
from .penalties import *
