"""Everything that takes networks out: `from fasterai.deploy.all import *`."""

from .files import *
from .fold import *
from .sparse_files import *
