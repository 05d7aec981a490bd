"""One candidate of `compare_kernels.py`: answers questions, a line of JSON each, on standard input.

check: hold results to fp64 on a few shapes, with what the plain formula errs there, and to
themselves in further runs. build: make inputs and launches of one shape. time: calls back to back,
or apart.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import pynvml
import torch
import triton
from torch import Tensor

from cs336_systems.attention import hopper_launch
from cs336_systems.attention.plain import scaled_dot_prod_attention
from cs336_systems.attention.reference import reference_gradients
from cs336_systems.attention.triton_launch import plan_postprocess, plan_preprocess

# Heads of queries and of keys, queries, keys.
CHECKED = ((4, 2, 1000, 1000), (2, 2, 449, 129), (4, 4, 2048, 2048))
FACTOR = 3.0
"""Times the plain formula's error in the same dtype, beside one rounding of the largest."""
REPEATS = 8
_BURST_MS = 20.0
_FLUSHED_BYTES = 256 << 20
_LAUNCH_CYCLES = 400_000
"""For how long the GPU waits before a call apart, so that the host is done with it: 0.2 ms."""
_PAUSE = 0.5
"""Of what a call apart takes."""
_FEWEST_APART = 7

Run = Callable[[], None]


def inputs(sizes: tuple[int, int, int, int], head_dim: int, batch: int) -> list[Tensor]:
    """Return q, k, v and dO."""
    heads, kv_heads, num_queries, num_keys = sizes
    generator = torch.Generator("cuda").manual_seed(5)
    shapes = [(heads, num_queries), (kv_heads, num_keys), (kv_heads, num_keys)]
    return [
        torch.randn(
            batch, *shape, head_dim, device="cuda", dtype=torch.bfloat16, generator=generator
        )
        for shape in (*shapes, shapes[0])
    ]


def build(
    which: str, tensors: list[Tensor], *, causal: bool, tile: dict[str, Any]
) -> tuple[Run, list[Tensor]]:
    """Return a pass as one call, and where its results are."""
    q, k, v, do = tensors
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    scale, head_dim = q.shape[3] ** -0.5, q.shape[3]
    how: dict[str, Any] = {"causal": causal, "scale": scale}
    tiles: Any = hopper_launch.FORWARD if which == "forward" else hopper_launch.BACKWARD
    # A checkout's own choice, unless its tile is to have other values.
    other = replace(tiles[head_dim], **tile) if tile else None
    if which == "forward":
        return hopper_launch.plan_hopper_forward(q, k, v, o, lse, **how, tile=other).run, [o, lse]
    hopper_launch.plan_hopper_forward(q, k, v, o, lse, **how).run()
    rows = triton.cdiv(q.shape[2], 128) * 128
    lse2, delta = (q.new_empty((*q.shape[:2], rows), dtype=torch.float32) for _ in range(2))
    sums = lse2.new_empty((lse2.numel(), head_dim))
    grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
    # Older checkouts know one order of L and D alone.
    knows_orders = "fragments" in inspect.signature(plan_preprocess).parameters
    order = {"fragments": True} if knows_orders else {}
    launches = (
        plan_preprocess(o, do, lse, lse2, delta, sums, **order),
        hopper_launch.plan_hopper_backward(
            q, k, v, do, lse2, delta, sums, *grads[1:], **how, tile=other
        ),
        plan_postprocess(sums, grads[0], rows, scale, fragments=True),
    )

    def run() -> None:
        for launch in launches:
            launch.run()

    return run, grads


def check(which: str, head_dim: int, tile: dict[str, Any]) -> dict[str, Any]:
    """Return the largest error over the plain formula's, by result.

    Raises: AssertionError for an error past the budget, or results that move.
    """
    worst: dict[str, float] = {}
    for sizes in CHECKED:
        for causal in (True, False):
            tensors = inputs(sizes, head_dim, 2)
            exact = reference_gradients(*tensors, is_causal=causal)
            leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
            o = scaled_dot_prod_attention(*leaves, is_causal=causal)
            plain = {"o": o.detach()}
            for name, grad in zip(
                ("dq", "dk", "dv"), torch.autograd.grad(o, leaves, tensors[3]), strict=True
            ):
                plain[name] = grad
            names = ["o"] if which == "forward" else ["dq", "dk", "dv"]
            run, results = build(which, tensors, causal=causal, tile=tile)
            for result in results:
                result.fill_(float("nan"))
            run()
            first = [result.clone() for result in results]
            for name, got in zip(names, first, strict=False):
                truth = getattr(exact, name)
                error = (got.double() - truth).abs().max().item()
                allowed = (plain[name].double() - truth).abs().max().item()
                budget = FACTOR * allowed + 2**-8 * truth.abs().max().item() / 2
                assert error <= budget, f"{name} errs by {error:g}, {budget:g} allowed, at {sizes}"
                worst[name] = max(worst.get(name, 0.0), error / max(allowed, 1e-30))
            for _ in range(REPEATS):
                run()
                for name, again, before in zip(names, results, first, strict=False):
                    # dQ is added up in any order.
                    moved = name != "dq" and not torch.equal(again, before)
                    assert not moved, f"{name} moves from run to run at {sizes}"
    return {"errors": worst}


def burst(run: Run, seconds: float) -> list[float]:
    """Return median ms of a call, MHz and W over some seconds of calls back to back."""
    one = _elapsed(run, 5) / 5
    calls = max(3, min(200, int(_BURST_MS / one)))
    return _medians(lambda: _elapsed(run, calls) / calls, seconds)


def apart(run: Run, seconds: float) -> list[float]:
    """Return median ms of a call, MHz and W over some seconds of calls with pauses.

    As the benchmarks call: a flush of L2 comes before each. No call waits for the host, and the GPU
    has some time to cool, so that two medians differ by less than two of bursts.
    """
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    run()

    def once() -> float:
        flushed.zero_()
        torch.cuda.synchronize()
        torch.cuda._sleep(_LAUNCH_CYCLES)
        return _elapsed(run, 1)

    return _medians(once, seconds, fewest=_FEWEST_APART, pause=_PAUSE)


def _medians(
    once: Callable[[], float], seconds: float, *, fewest: int = 1, pause: float = 0.0
) -> list[float]:
    """Return the medians of what `once` returns, ms, and of MHz and W behind it, over some seconds.

    pause: before the next time, of what `once` returned.
    """
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    times: list[float] = []
    clocks, powers = [], []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times) < fewest:
        times.append(once())
        clocks.append(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
        powers.append(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)
        time.sleep(pause * times[-1] / 1000)
    return [median(times), median(clocks), median(powers)]


def _elapsed(run: Run, calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def be_ready() -> None:
    """Raise RuntimeError where the kernels cannot run."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        raise RuntimeError(f"needs a GPU of compute capability 9.0, found {found}")
    pynvml.nvmlInit()


def main() -> None:
    """Answer until standard input ends."""
    run: Run | None = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            be_ready()
            if question["do"] == "check":
                answer = check(question["which"], question["head_dim"], question["tile"])
            elif question["do"] == "build":
                batch, heads, seq, head_dim = question["size"]
                tensors = inputs((heads, heads, seq, seq), head_dim, batch)
                run, _ = build(
                    question["which"], tensors, causal=question["causal"], tile=question["tile"]
                )
                run()
                torch.cuda.synchronize()
                answer = {}
            else:
                assert run is not None
                how = apart if question["apart"] else burst
                answer = {"timed": how(run, question["seconds"])}
        except Exception as error:  # whatever a candidate does wrong is its answer
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
