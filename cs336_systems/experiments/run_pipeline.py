"""The pipeline as a script: `python cs336_systems/experiments/run_pipeline.py --config FILE`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A clone works as it is; an installed cs336_basics, which may be the user's own, goes first.
sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("cs336_basics") is None:
    sys.path.append(str(ROOT / "cs336-basics"))

from cs336_systems.train.pipeline import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
