"""One of the ranks that the pipeline starts, given the config that it has written."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

from cs336_systems.errors import UsageError
from cs336_systems.parallel.checkpoint import CheckpointError
from cs336_systems.train.config import PipelineConfig, read_config
from cs336_systems.train.data_stages import DataStages
from cs336_systems.train.pipeline_training import Training

_PR_SET_PDEATHSIG = 1


def main(config_path: Path) -> int:
    """Train on the data that is there, and return the exit status."""
    _end_with_launcher()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = read_config(PipelineConfig, config_path)
        folder = config_path.parent
        return Training(config, folder).as_rank(DataStages(config, folder / "data").existing())
    except (UsageError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2


def _end_with_launcher() -> None:
    """Have the system send SIGTERM, on which a rank saves, should the launcher be killed."""
    launcher = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
