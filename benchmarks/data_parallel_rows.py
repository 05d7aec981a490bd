"""What several ranks found in one training, put into one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from data_parallel_cases import TrainingCase
from data_parallel_ranks import MEGABYTE, LinkTimes, Phase, TrainingResult
from model_size import model_config

from cs336_systems.accounting import parameters
from cs336_systems.measure.ranks import slowest
from cs336_systems.parallel import STRATEGIES
from cs336_systems.parallel.bucket_model import Gradients
from cs336_systems.parallel.traffic import traffic, wire_bytes, wire_factor

KINDS = ("parameters", "gradients", "optimizer_state", "communication", "activations")
_LEAST_SECONDS = 1e-9


def metrics(case: TrainingCase, results: Sequence[TrainingResult]) -> dict[str, float | None]:
    """Return the row's numbers: memory of the rank that needs most, communication as measured."""
    peaks = [result.step_peak_bytes for result in results if result.step_peak_bytes is not None]
    found: dict[str, float | None] = {"loss": results[0].loss}
    if peaks:
        found["peak_bytes"] = max(peaks)
    for phase in results[0].phases:
        found.update(_memory(phase, [result.phases[phase] for result in results]))
    if (expected := case.predicted()) is not None:
        found["predicted_held_bytes"] = expected.held
    return {**found, **_communication(results)}


def _memory(name: str, phases: Sequence[Phase]) -> dict[str, float | None]:
    """Return the memory of the rank that needs most, so that its parts add up."""
    most = max(phases, key=lambda phase: (phase.peak_bytes or 0, _held(phase)))
    found: dict[str, float | None] = {f"{name}_{kind}_bytes": most.held[kind] for kind in KINDS}
    found[f"{name}_held_bytes"] = _held(most)
    found[f"{name}_peak_bytes"] = most.peak_bytes
    return {key: value for key, value in found.items() if value is not None}


def _held(phase: Phase) -> int:
    return sum(phase.held[kind] or 0 for kind in KINDS if kind != "activations")


def _communication(results: Sequence[TrainingResult]) -> dict[str, float | None]:
    """Return the profiled step's times on the rank that communicated least.

    A collective lasts from its first rank's call: on the others it is longer by what they waited.
    """
    timelines = [result.timeline for result in results if result.timeline is not None]
    if len(timelines) < len(results):
        return {}
    least = min(timelines, key=lambda timeline: timeline.communication_ms)
    waits = {"gather_wait_ms": least.gather_wait_ms} if least.gathers else {}
    return {
        "profiled_step_ms": least.step_ms,
        "communication_ms": least.communication_ms,
        "unhidden_ms": least.unhidden_ms,
        **waits,
    }


def counts(case: TrainingCase, results: Sequence[TrainingResult]) -> dict[str, int]:
    """Return what rank 0 sends in a step; a peer's messages are not seen."""
    if STRATEGIES[case.strategy].peer:
        return {}
    log = results[0].log
    sizes = {"collectives": len(log), "wire_bytes": round(wire_bytes(log))}
    return {**sizes, **{name: each.num_calls for name, each in traffic(log).items()}}


def lanes(results: Sequence[TrainingResult]) -> Mapping[str, str] | None:
    """Return every rank's lanes, named `rank kind`."""
    found = {
        f"{rank} {kind}": values
        for rank, result in enumerate(results)
        if result.timeline is not None
        for kind, values in result.timeline.lanes().items()
    }
    return found or None


def communication_prediction(
    case: TrainingCase, results: Sequence[TrainingResult], links: Sequence[LinkTimes]
) -> dict[str, float | None]:
    """Return how long the measured links take for what a rank sends; a peer's is not known."""
    if STRATEGIES[case.strategy].peer:
        return {}
    _, bytes_per_s = _rates(links)
    sent_per_s = bytes_per_s * wire_factor("all_reduce", case.ranks)
    return {
        "link_gb_per_s": bytes_per_s / 1e9,
        "predicted_communication_ms": wire_bytes(results[0].log) / sent_per_s * 1e3,
    }


def _rates(links: Sequence[LinkTimes]) -> tuple[float, float]:
    """Return the seconds of an all-reduce of no size, and the bytes/s of a large one's message."""
    call_seconds = median(slowest([link.small for link in links]))
    large_seconds = median(slowest([link.large for link in links]))
    return call_seconds, links[0].large_bytes / max(large_seconds - call_seconds, _LEAST_SECONDS)


def bucket_prediction(case: TrainingCase, links: Sequence[LinkTimes]) -> dict[str, float | None]:
    """Return what the model of buckets makes of the measured links for a case's bucket size."""
    call_seconds, bytes_per_s = _rates(links)
    config = model_config(case.size, case.context)
    width = 2 if case.communication == "bf16" else 4
    gradients = Gradients(
        num_bytes=parameters(config).total * width,
        bytes_per_s=bytes_per_s,
        call_seconds=call_seconds,
    )
    found: dict[str, float | None] = {
        "call_us": call_seconds * 1e6,
        "link_gb_per_s": bytes_per_s / 1e9,
        "best_bucket_mb": gradients.best_bucket_bytes / MEGABYTE,
    }
    if case.bucket_mb is not None:
        # Buckets hold so many bytes of gradients as they lie, in fp32.
        num_buckets = max(1.0, parameters(config).total * 4 / (case.bucket_mb * MEGABYTE))
        found["predicted_exposed_ms"] = gradients.exposed_seconds(num_buckets) * 1e3
    return found
