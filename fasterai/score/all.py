"""Everything that scores on data: `from fasterai.score.all import *`."""

from .criteria import *
from .oracle import *
from .report import *
from .score import *
