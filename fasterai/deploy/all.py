"""Everything that takes networks out: `from fasterai.deploy.all import *`."""

from .compact_layers import *
from .export import *
from .files import *
from .fold import *
from .low_rank import *
from .quantize import *
from .semi_structured import *
from .sparse_files import *
from .sparse_layers import *
