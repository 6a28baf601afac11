"""Everything, for notebooks: `from fasterai.all import *`."""

from .audit.all import *
from .core.criteria import *
from .core.granularity import *
from .core.schedule import *
from .core.target import *
from .deploy.all import *
from .distill.all import *
from .measure.layers import *
from .measure.pictures import *
from .measure.profile import *
from .measure.weight_pictures import *
from .prune.all import *
from .regularize.all import *
from .report.all import *
from .score.all import *
from .sparse.all import *
from .tickets.all import *
