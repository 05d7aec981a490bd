"""Without a GPU Triton's kernels run in its interpreter, chosen before Triton is imported. In the
background interrupts count as well."""

from __future__ import annotations

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # What a script starts in the background ignores interrupts, and so would all processes that
    # tests start in order to interrupt them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
