"""What the measurements ran on: names, versions, limits, clocks. What cannot be known is None."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cs336_systems.errors import bad

PEAKS: dict[str, dict[str, float]] = {
    # Dense rates and memory bandwidth by the makers' data sheets, in FLOP/s and bytes/s.
    "NVIDIA H200": {
        "fp32": 67e12, "tf32": 494.7e12, "fp16": 989.4e12, "bf16": 989.4e12, "mem": 4.8e12,
    },
    "NVIDIA H100 80GB HBM3": {
        "fp32": 67e12, "tf32": 494.7e12, "fp16": 989.4e12, "bf16": 989.4e12, "mem": 3.35e12,
    },
    "NVIDIA A100-SXM4-80GB": {
        "fp32": 19.5e12, "tf32": 156e12, "fp16": 312e12, "bf16": 312e12, "mem": 2.039e12,
    },
    "NVIDIA A100-SXM4-40GB": {
        "fp32": 19.5e12, "tf32": 156e12, "fp16": 312e12, "bf16": 312e12, "mem": 1.555e12,
    },
    "NVIDIA L4": {"fp32": 30.3e12, "tf32": 60e12, "fp16": 121e12, "bf16": 121e12, "mem": 0.3e12},
}  # fmt: skip


def pick_device(name: str | None) -> torch.device:
    """Return the device to run on: `cpu`, `cuda`, or by None the GPU when there is one.

    Raises: UsageError when a GPU is asked for and none is found.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise bad("benchmarks", "--device", "be cpu or cuda", name)
    if name == "cuda" and not torch.cuda.is_available():
        raise bad(
            "benchmarks", "--device", "be a device that torch finds (0 CUDA devices here)", name
        )
    return torch.device(name)


@cache
def device_facts(kind: str) -> dict[str, Any]:
    """Return everything about the device and its software that a reader of a result needs."""
    return {**_software(), **(_cuda_facts() if kind == "cuda" else _cpu_facts())}


def conditions(device: torch.device) -> dict[str, Any]:
    """Return the clocks and the reasons for which the driver holds them down at this moment."""
    if device.type != "cuda" or (nvml := _nvml()) is None:
        return {}
    handle = _nvml_handle(nvml)
    return {
        "sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "throttle": _throttle_reasons(nvml, handle),
    }


def commit_facts(root: Path) -> dict[str, Any] | None:
    """Return the commit that the tree at `root` is at, or None outside a git checkout."""

    def git(*args: str) -> str:
        return subprocess.run(
            ("git", "-C", str(root), *args), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _software() -> dict[str, Any]:
    try:
        import triton

        triton_version: str | None = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
    }


def _cpu_facts() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0].split(":", 1)[1].strip() if models else name
    return {
        "kind": "cpu",
        "name": name,
        "count": 1,
        "threads": torch.get_num_threads(),
        "peak_flops": None,
        "peak_bytes_per_s": None,
    }


def _cuda_facts() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    peaks = dict(PEAKS.get(properties.name, {}))
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    return {
        "kind": "cuda",
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "sm_count": properties.multi_processor_count,
        "cudnn": str(torch.backends.cudnn.version()),
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        "peak_bytes_per_s": peaks.pop("mem", None),
        "peak_flops": peaks or None,
        **_nvml_facts(),
    }


def _nvml_facts() -> dict[str, Any]:
    nvml = _nvml()
    if nvml is None:
        return {}
    handle = _nvml_handle(nvml)
    return {
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "sm_clock_max_mhz": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_max_mhz": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_limit_w": nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
    }


@cache
def _nvml() -> Any | None:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # Absent package, absent driver, refused by a container: facts stay unknown.
        return None
    return pynvml


@cache
def _nvml_handle(nvml: Any) -> Any:
    # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's.
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")


def _throttle_reasons(nvml: Any, handle: Any) -> str:
    active = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    prefix = "nvmlClocksEventReason"
    reasons = [
        name.removeprefix(prefix)
        for name in dir(nvml)
        if name.startswith(prefix) and isinstance(bit := getattr(nvml, name), int) and bit & active
    ]
    harmless = {"GpuIdle", "None", "All", "ApplicationsClocksSetting", "UserDefinedClocks"}
    return ", ".join(sorted(set(reasons) - harmless)) or "none"
