"""The ground-truth models are examples; their folder is put on the path for these tests."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = str(Path(__file__).parents[2] / "examples" / "ground_truth")
if EXAMPLES not in sys.path:
    sys.path.insert(0, EXAMPLES)
