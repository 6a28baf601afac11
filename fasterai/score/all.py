"""Everything that scores on data: `from fasterai.score.all import *`."""

from .criteria import *
from .score import *
