"""Encoding a corpus into token files, beside the `tokenizers` library alone on the same texts."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from cases import Selection
from tokenizers import Tokenizer

from cs336_systems.measure.pytest_plugin import GpuBenchmark
from cs336_systems.measure.record import Case
from cs336_systems.measure.workload import Workload
from cs336_systems.train.corpus import CorpusConfig, Piece, read_corpus
from cs336_systems.train.tokenizer import BpeTokenizer, train
from cs336_systems.train.tokens import encode_corpus

BASELINE = {"encoder": "tokenizers alone"}
VOCAB_SIZE = 1024


def sweep(chosen: Selection) -> tuple[str, list[Any]]:
    """Ours and the library's own; the gate times neither. A GPU's host has cores for more text."""
    encoders = ["encode_corpus", BASELINE["encoder"]]
    megabytes = 1 if chosen.smoke else 50 if chosen.device.type == "cuda" else 8
    return "encoder, megabytes", [] if chosen.gate else [(name, megabytes) for name in encoders]


SWEEPS = {"bench_encoding": sweep}


@functools.cache
def corpus(megabytes: int) -> tuple[list[Piece], BpeTokenizer]:
    """Return the builtin corpus and a tokenizer trained on a part of it."""
    pieces = list(read_corpus(CorpusConfig(megabytes=megabytes)))
    return pieces, train(read_corpus(CorpusConfig(megabytes=1)), VOCAB_SIZE)


def bench_encoding(gpu_benchmark: GpuBenchmark, encoder: str, megabytes: int) -> None:
    """Encode the builtin corpus on the library's own threads, in memory or into files."""
    pieces, tokenizer = corpus(megabytes)
    case = Case(
        study="encoding",
        params={"encoder": encoder, "megabytes": megabytes},
        rounds=5,
        warmup_rounds=1,
        baseline=BASELINE,
    )

    def build() -> Workload:
        texts = [piece.text for piece in pieces]
        library = Tokenizer.from_str(tokenizer.json_text)

        def alone() -> None:
            library.encode_batch_fast(texts, add_special_tokens=False)

        def into_files() -> None:
            with tempfile.TemporaryDirectory() as folder:
                encode_corpus(pieces, tokenizer, Path(folder))

        return Workload(step=alone if encoder == BASELINE["encoder"] else into_files)

    gpu_benchmark(case, build=build)
