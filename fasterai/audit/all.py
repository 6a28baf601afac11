"""Everything that audits: `from fasterai.audit.all import *`."""

from .batch_norms import *
from .classes import *
from .sensitivity import *
