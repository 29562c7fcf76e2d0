"""The images that the components run in; the only place that names them."""

from slmops import __version__

BASE = f"slmops/base:{__version__}"
TRAIN = f"slmops/train:{__version__}"
OPTIMIZE = f"slmops/optimize:{__version__}"
