"""Makes the helper modules beside these tests importable."""

import sys
from pathlib import Path

# Importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))
