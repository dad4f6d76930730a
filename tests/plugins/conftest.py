"""Puts the example plugins on the path: they need no installation to be tested."""

import sys
from pathlib import Path

for folder in Path(__file__).parent.glob("*/src"):
    sys.path.insert(0, str(folder))
