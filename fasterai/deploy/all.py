"""Everything that saves and loads: `from fasterai.deploy.all import *`."""

from .files import *
