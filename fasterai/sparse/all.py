"""Everything that writes zeros: `from fasterai.sparse.all import *`."""

from ..core.criteria import *
from ..core.granularity import *
from ..core.schedule import *
from .callback import *
from .dropout import *
from .sparsifier import *
from .threshold import *
