"""Run pytest on a build with AddressSanitizer and UndefinedBehaviorSanitizer; see README.md."""

import os
import subprocess
import sys

from sanitizers import ROOT, build_for_python

if __name__ == "__main__":
    orders = build_for_python(os.environ.get("CC", "gcc"))
    # A crash belongs to the sanitizer, which tells more of it than faulthandler.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:faulthandler",
        "-p",
        "forking",
        *sys.argv[1:],
    ]
    sys.exit(subprocess.run(command, cwd=ROOT, env=orders).returncode)
