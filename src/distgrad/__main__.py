"""``python -m distgrad``: the command line."""

import sys

from distgrad.launch.cli import main

sys.exit(main())
