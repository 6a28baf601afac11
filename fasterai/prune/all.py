"""Everything that removes: `from fasterai.prune.all import *`."""

from ..core.criteria import *
from .amounts import *
from .callback import *
from .gradual import *
from .history import *
from .optimizer import *
from .plan import *
from .pruner import *
from .search import *
