"""Ranks import the modules of this folder by name too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
