"""Makes the helper modules of these and of the unit tests importable."""

import sys
from pathlib import Path

# Importlib mode puts no folder on the path.
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("unit", "ops", "faults"))]
