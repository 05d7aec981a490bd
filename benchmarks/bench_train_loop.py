"""What the training loop adds to a step: its own steps beside the bare step of the same model."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases import Selection
from model_bench import ModelCase, ModelSlot

from cs336_systems.config import PRESETS, preset
from cs336_systems.measure.pytest_plugin import GpuBenchmark
from cs336_systems.measure.record import Case
from cs336_systems.measure.workload import Workload
from cs336_systems.parallel.environment import init_from_environment
from cs336_systems.train.config import (
    PRECISIONS,
    EvaluationConfig,
    LoggingConfig,
    ModelSection,
    PipelineConfig,
    TrainingConfig,
)
from cs336_systems.train.corpus import END_OF_TEXT, CorpusConfig, read_corpus
from cs336_systems.train.loop import train
from cs336_systems.train.run_log import read_log
from cs336_systems.train.tokenizer import NUM_BYTES
from cs336_systems.train.tokenizer import train as train_tokenizer
from cs336_systems.train.tokens import encode_corpus

STEPS_PER_ROUND = 10
"""Between two lines of the loop's log, which is where it waits for the device."""
WARMUP_ROUNDS = 2


def sweep(chosen: Selection) -> tuple[str, list[tuple[Any, ...]]]:
    """The smallest size at the smallest context: the shorter a step, the more an overhead shows.

    On a GPU also the next size at the longest, where the device decides and not a host that others
    may share. Of sizes whose vocabulary has room for a tokenizer; when none of those chosen has,
    the smallest.
    """
    sizes = [size for size in chosen.sizes if preset(size).vocab_size > NUM_BYTES]
    sizes = sizes or [size for size in PRESETS if preset(size).vocab_size > NUM_BYTES][:1]
    known = [precision for precision in chosen.precisions if precision in PRECISIONS]
    on_gpu = chosen.device.type == "cuda"
    points = [(sizes[0], chosen.contexts[0])]
    if on_gpu:
        points.append((sizes[:2][-1], chosen.contexts[-1]))
    return "size, context, precision, how", [
        (size, context, precision, how)
        for size, context in dict.fromkeys(points)
        for precision in (known if on_gpu else known[:1])
        for how in ("bare step", "loop")
        if not chosen.gate
    ]


SWEEPS = {"bench_train_loop": sweep}


def bench_train_loop(
    gpu_benchmark: GpuBenchmark,
    chosen: Selection,
    model_slot: ModelSlot,
    size: str,
    context: int,
    precision: str,
    how: str,
) -> None:
    """Time steps back to back: on one batch that is there, or in the loop with all it does."""
    case = ModelCase(
        size=size,
        context=context,
        precision=precision,
        compile_mode="eager",
        attention=chosen.attention,
        batch_size=chosen.batch_size,
        device=chosen.device,
    )
    record = case.record_case("train_loop", "full_step")
    record = replace(
        record,
        params={**record.params, "how": how},
        baseline={"how": "bare step"},
        calls_per_round=STEPS_PER_ROUND,
    )

    def build() -> Workload:
        case.refuse_what_is_missing()
        case.refuse_what_cannot_fit("full_step")
        if how == "bare step":
            return model_slot.get(case).workload("full_step")
        model_slot.clear()
        rounds = record.rounds or gpu_benchmark.harness.settings.rounds
        return Workload(step=lambda: None, replay_seconds=_steps_of_the_loop(case, record, rounds))

    gpu_benchmark(record, build=build)


def _steps_of_the_loop(case: ModelCase, record: Case, rounds: int) -> list[float]:
    """Return the seconds per step that the loop's own log has, for each of its lines."""
    config = PipelineConfig(
        model=ModelSection(preset=case.size, context_length=case.context),
        training=TrainingConfig(
            num_steps=STEPS_PER_ROUND * (WARMUP_ROUNDS + rounds),
            warmup_steps=0,
            batch_size=case.batch_size,
            precision=case.precision,
            attention_kernel=case.attention,
            max_grad_norm=0.0,  # nor does the bare step clip
            device=case.device.type,
        ),
        evaluation=EvaluationConfig(interval=0, num_batches=1, sample_tokens=0),
        logging=LoggingConfig(interval=STEPS_PER_ROUND, progress=False),
    )
    backend = "nccl" if case.device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as name, init_from_environment(backend):
        log_path = _train(config, Path(name), preset(case.size).vocab_size)
        lines = read_log(log_path)
    assert record.tokens is not None
    return [record.tokens / line["tokens_per_s"] for line in lines[WARMUP_ROUNDS:]]


def _train(config: PipelineConfig, folder: Path, vocab_size: int) -> Path:
    """Train on builtin text, with a tokenizer that has as many ids as the bare step's model."""
    pieces = list(read_corpus(CorpusConfig(megabytes=0.3)))
    fillers = [f"<|filler{number}|>" for number in range(vocab_size - NUM_BYTES - 1)]
    tokenizer = train_tokenizer(pieces, vocab_size, [END_OF_TEXT, *fillers])
    encode_corpus(pieces, tokenizer, folder)
    result = train(
        config,
        tokenizer=tokenizer,
        train_tokens=folder / "train.npy",
        validation_tokens=folder / "validation.npy",
        output_dir=folder / "run",
    )
    return result.log_path
