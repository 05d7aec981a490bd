"""Run as a script by bench_warmup: full steps from a cold start; prints their seconds as a JSON
list."""

from __future__ import annotations

import json
import sys

import torch
from model_bench import ModelBench, ModelCase

from cs336_systems.measure.clock import WallClock, synchronizer


def main(arguments: list[str]) -> None:
    """Time `rounds` full steps after `warmup` untimed ones."""
    size, context, batch_size, device_name, attention, warmup, rounds = arguments
    device = torch.device(device_name)
    case = ModelCase(
        size=size,
        context=int(context),
        precision="fp32",
        compile_mode="eager",
        attention=attention,
        batch_size=int(batch_size),
        device=device,
    )
    step = ModelBench(case).workload("full_step").step
    clock = WallClock(synchronizer(device))
    seconds = []
    for _ in range(int(warmup) + int(rounds)):
        start = clock()
        step()
        seconds.append(clock() - start)
    print(json.dumps(seconds[int(warmup) :]))


if __name__ == "__main__":
    main(sys.argv[1:])
