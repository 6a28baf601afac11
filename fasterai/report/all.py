"""Everything that tells what came of it: `from fasterai.report.all import *`."""

from .pictures import *
from .sweep import *
