"""Everything that audits: `from fasterai.audit.all import *`."""

from .classes import *
from .sensitivity import *
