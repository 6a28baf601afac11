"""Masks and lottery tickets as values: `from fasterai.tickets.all import *`."""

from .callback import *
from .masks import *
from .ticket import *
