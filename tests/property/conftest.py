"""Makes the helper modules of these and of the unit tests importable."""

import sys
from pathlib import Path

# Importlib mode puts no folder on the path.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "unit")]
