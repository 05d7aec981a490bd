"""The studies of fused attention made by hand: plausible times for every row, no clock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import report_fixtures as fx

PLAIN = ("scaled_dot_prod_attention", "scaled_dot_prod_attention_compiled", "vectorized_torch")
OURS = ("flash_attention_torch", "flash_attention_triton")
PEERS = ("sdpa", "sdpa_cudnn", "sdpa_flash", "flex")
# Share of the device's peak that a long pass reaches.
SHARE = {
    "scaled_dot_prod_attention": 0.01, "scaled_dot_prod_attention_compiled": 0.03,
    "vectorized_torch": 0.02, "flash_attention_torch": 0.004, "flash_attention_triton": 0.5,
    "sdpa": 0.55, "sdpa_cudnn": 0.6, "sdpa_flash": 0.4, "flex": 0.35,
}  # fmt: skip
PEAK = {"fp32": 6.7e13, "bf16": 9.89e14, "fp16": 9.89e14}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
TENSORS = {"forward": 4, "backward": 8, "forward_backward": 8}
PRODUCTS = {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}
SHAPES = [
    (batch, 16, seq, d, causal)
    for batch, seq, d in ((1, 16384, 64), (8, 2048, 64), (1, 16384, 128), (8, 2048, 128))
    for causal in (True, False)
] + [(1, 32, 32768, 128, True)]

Shape = tuple[int, int, int, int, bool]


def work(shape: Shape, dtype: str, which: str) -> dict[str, Any]:
    """Return what a case says of its work."""
    batch, heads, seq, d, causal = shape
    flops = 4.0 * batch * heads * seq**2 * d * (0.5 if causal else 1.0) * PRODUCTS[which]
    least = TENSORS[which] * batch * heads * seq * d * BYTES[dtype]
    return {"flops": flops, "flops_dtype": dtype, "least_bytes": least}


def seconds(attention: str, shape: Shape, dtype: str, which: str) -> float:
    """Return a time that launches bound for short sequences and the row's share for long."""
    few = min(1.0, shape[0] * shape[1] * shape[2] / 132 / 128)
    rate = PEAK[dtype] * SHARE[attention] * few * (0.8 if which != "forward" else 1.0)
    return 8e-6 + float(work(shape, dtype, which)["flops"]) / rate


def named(attention: str, shape: Shape, dtype: str, which: str) -> dict[str, Any]:
    """Return the parameters of a case on a named shape."""
    batch, heads, seq, d, causal = shape
    name = f"B{batch} H{heads} S{seq} D{d} {'causal' if causal else 'full'}"
    params = {"attention": attention, "shape": name, "dtype": dtype, "pass": which}
    return {**params, "batch": batch, "heads": heads, "seq": seq, "d": d, "causal": causal}


def sweep(dtypes: tuple[str, ...] = ("bf16", "fp32")) -> Iterator[dict[str, Any]]:
    """Yield the course's sweep: plain rows run out of memory, the slow row is ended early."""
    for attention in (*PLAIN, *OURS, *PEERS, "flash_attn_4"):
        for dtype in dtypes:
            for d in (16, 32, 64, 128):
                for seq in (2**power for power in range(7, 17)):
                    for which in TENSORS:
                        yield _swept(attention, dtype, d, seq, which)


def _swept(attention: str, dtype: str, d: int, seq: int, which: str) -> dict[str, Any]:
    case = {"attention": attention, "dtype": dtype, "d": d, "seq": seq, "pass": which}
    shape = (1, 1, seq, d, True)
    more = {"clock": "gpu_ms", "cache": "cold", **work(shape, dtype, which)}
    if attention == "flash_attn_4" or (attention in PEERS[1:3] and dtype == "fp32"):
        reason = f"{attention}: takes fp16 and bf16, not fp32"
        return fx.untimed("flash_sweep", case, "skipped", reason=reason, **more)
    if attention in PLAIN and seq > 32768:
        return fx.untimed("flash_sweep", case, "oom", reason="ran out of memory", **more)
    if attention == "flash_attention_torch" and seq > 4096:
        return fx.untimed("flash_sweep", case, "skipped", reason="predicted 1.2 s a call", **more)
    return fx.timed("flash_sweep", case, seconds(attention, shape, dtype, which), **more)


def shapes() -> Iterator[dict[str, Any]]:
    """Yield the shapes that matter: our kernel, its peers, and one that is not installed."""
    for shape in SHAPES:
        for which in ("forward", "backward"):
            for attention in ("flash_attention_triton", *PEERS):
                case = named(attention, shape, "bf16", which)
                kept = 5 * shape[0] * shape[1] * shape[2] * shape[3] * 2
                counts = {} if which == "forward" else {"saved_bytes": kept}
                more = {"clock": "gpu_ms", "cache": "cold", "counts": counts}
                more |= {"baseline": {"attention": "sdpa_flash"}, **work(shape, "bf16", which)}
                if attention == "flex" and shape[2] == 32768:
                    reason = "flex: raised RuntimeError: no"
                    yield fx.untimed("attention_shapes", case, "skipped", reason=reason, **more)
                    continue
                time = seconds(attention, shape, "bf16", which)
                yield fx.timed("attention_shapes", case, time, **more)
            case = named("flash_attn_4", shape, "bf16", which)
            yield fx.untimed("attention_shapes", case, "not_installed", reason="no flash_attn")


def ladder() -> Iterator[dict[str, Any]]:
    """Yield the Hopper kernels with one thing changed at a time."""
    changes = {
        "forward": ("nothing", "ping_pong = False", "persistent = False", "num_groups = 2"),
        "backward": ("nothing", "hold = False", "do_stages = 1", "q_stages = 2"),
    }
    for shape in SHAPES[:-1]:
        for which, names in changes.items():
            for place, changed in enumerate(names):
                case = named("sdpa", shape, "bf16", which) | {"changed": changed}
                del case["attention"], case["dtype"]
                time = seconds("sdpa", shape, "bf16", which) * (1 + place / 20)
                more = {"baseline": {"changed": "nothing"}, **work(shape, "bf16", which)}
                yield fx.timed("hopper_ladder", case, time, clock="gpu_ms", **more)


def harness() -> Iterator[dict[str, Any]]:
    """Yield the public harness, whose `do_bench` reads a tenth more than our clock."""
    shape = (1, 16, 16384, 64, True)
    for attention in ("flash_attention_triton", *PEERS):
        case = {**named(attention, shape, "bf16", "forward_backward"), "compile": "function"}
        time = seconds(attention, shape, "bf16", "forward_backward")
        more = {"clock": "gpu_ms", "metrics": {"do_bench_ms": time * 1.1e3}}
        more |= work(shape, "bf16", "forward_backward")
        yield fx.timed("attention_harness", case, time, **more)


def host_bound() -> Iterator[dict[str, Any]]:
    """Yield calls of which fifty make a round."""
    for seq in (128, 1024):
        for which in ("forward", "forward_backward"):
            for place, attention in enumerate(("flash_attention_triton", *PEERS)):
                case = named(attention, (1, 1, seq, 64, True), "bf16", which)
                time = 2e-5 * (1 + place / 3) * PRODUCTS[which]
                yield fx.timed("attention_host_bound", case, time, calls_per_round=50)


def fp32() -> Iterator[dict[str, Any]]:
    """Yield one shape in fp32."""
    shape = (1, 16, 4096, 64, True)
    for which in ("forward", "forward_backward"):
        for attention in ("flash_attention_triton", *PLAIN[:2], "sdpa", "flex"):
            case, more = named(attention, shape, "fp32", which), work(shape, "fp32", which)
            time = seconds(attention, shape, "fp32", which)
            yield fx.timed("attention_fp32", case, time, clock="gpu_ms", **more)


def errors() -> Iterator[dict[str, Any]]:
    """Yield errors against fp64, some rows without one of the dtypes."""
    eps = {"fp32": 1.2e-7, "fp16": 9.8e-4, "bf16": 7.8e-3}
    for d in (64, 128):
        for causal in (True, False):
            for dtype, unit in eps.items():
                for attention in (*PLAIN[:1], *OURS, *PEERS):
                    case = named(attention, (2, 4, 1024, d, causal), dtype, "forward")
                    if attention == "sdpa_flash" and dtype == "fp32":
                        reason = "takes fp16 and bf16, not fp32"
                        yield fx.untimed("attention_error", case, "skipped", reason=reason)
                        continue
                    metrics = {
                        f"{name}_{how}_error": unit * size * (1 + place)
                        for place, name in enumerate(("o", "dq", "dk", "dv"))
                        for how, size in (("max", 1.0), ("rms", 0.04))
                    }
                    yield fx.timed("attention_error", case, 1e-4, metrics=metrics)


def everything() -> list[dict[str, Any]]:
    """Return every study of fused attention."""
    return [*sweep(), *shapes(), *ladder(), *harness(), *host_bound(), *fp32(), *errors()]
