"""Everything that tells what came of it: `from fasterai.report.all import *`."""

from .page import *
from .pictures import *
from .sweep import *
