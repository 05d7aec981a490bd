"""What ranks do in the tests of launching; kept apart from pytest, which ranks do not import."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

FAULTY = 1
"""The rank in which things go wrong."""


def rank_and_sum(number: float, *, factor: float = 1.0) -> tuple[int, int, float]:
    total = torch.tensor(number * factor * (dist.get_rank() + 1), dtype=torch.float64)
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def add_rank_in_place(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for tensor in tensors.values():
        tensor.add_(dist.get_rank())
    return tensors


def pid() -> int:
    return os.getpid()


def surroundings() -> dict[str, object]:
    return {
        "modules": sorted({"pytest", "_pytest", "xdist"} & set(sys.modules)),
        "variables": [name for name in os.environ if name.startswith("PYTEST")],
        "num_threads": torch.get_num_threads(),
        "backend": dist.get_backend(),
        "argv": sys.argv[0],
    }


def cuda_device() -> tuple[int, Tensor]:
    ones = torch.ones(3, device="cuda")
    dist.all_reduce(ones)
    return torch.cuda.current_device(), ones


def write_pid(folder: str) -> None:
    with open(os.path.join(folder, str(os.getpid())), "w"):
        dist.barrier()


def write_pid_and_sleep(folder: str) -> None:
    write_pid(folder)
    time.sleep(60)


# --- faults; the other ranks meanwhile wait in a collective ---


def raise_error() -> None:
    if dist.get_rank() == FAULTY:
        raise LookupError("nothing at 42")
    dist.barrier()


def raise_after_the_others_felt_it() -> None:
    if dist.get_rank() == FAULTY:
        dist.destroy_process_group()
        time.sleep(0.5)
        raise LookupError("nothing at 42")
    dist.barrier()


def raise_everywhere() -> None:
    time.sleep(0.3 * (dist.get_world_size() - dist.get_rank()))
    raise LookupError("nothing at 42")


def exit_python(code: int) -> None:
    if dist.get_rank() == FAULTY:
        sys.exit(code)
    dist.barrier()


def exit_process(code: int) -> None:
    if dist.get_rank() == FAULTY:
        os._exit(code)
    dist.barrier()


def kill_by(number: int) -> None:
    if dist.get_rank() == FAULTY:
        os.kill(os.getpid(), number)
    dist.barrier()


def die_leaving_a_child_that_holds_the_pipe() -> None:
    if dist.get_rank() == FAULTY:
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        os._exit(3)
    dist.barrier()


def hang_in_python() -> None:
    if dist.get_rank() == FAULTY:
        time.sleep(60)
    dist.barrier()


def hang_alone() -> None:
    if dist.get_rank() == FAULTY:
        time.sleep(60)


def hang_holding_the_interpreter() -> None:
    if dist.get_rank() == FAULTY:
        ctypes.PyDLL(None).sleep(60)
    dist.barrier()


def stop() -> None:
    if dist.get_rank() == FAULTY:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def reduce_unequal_sizes() -> None:
    dist.all_reduce(torch.zeros(5000 if dist.get_rank() == FAULTY else 3))


def return_what_cannot_be_pickled() -> object:
    return lambda: None


def hang_on_gpu() -> None:
    if dist.get_rank() == FAULTY:
        time.sleep(60)
    dist.all_reduce(torch.ones(3, device="cuda"))
    torch.cuda.synchronize()
