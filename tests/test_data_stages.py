"""Do the stages from text to tokens run when they must, and leave good files when they fail?"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cs336_systems.errors import UsageError
from cs336_systems.train import tokenizer as bpe
from cs336_systems.train.config import CorpusConfig, PipelineConfig, from_dict
from cs336_systems.train.corpus import END_OF_TEXT, SPLITS, Piece, read_corpus, source_files
from cs336_systems.train.data_stages import DataStages
from cs336_systems.train.stories import stories
from cs336_systems.train.tokens import encode_corpus


class Bench:
    """A folder with a text of our own, and what the stages said of it."""

    def __init__(self, folder: Path) -> None:
        self.text = folder / "text.txt"
        self.data = folder / "data"
        self.said: list[str] = []
        self.write(40)

    def write(self, num_stories: int) -> None:
        self.text.write_text(END_OF_TEXT.join(islice(stories(0), num_stories)))

    def config(self, vocab_size: int = 300, **corpus: Any) -> PipelineConfig:
        return from_dict(
            PipelineConfig,
            {
                "corpus": {"source": f"file:{self.text}", **corpus},
                "tokenizer": {"vocab_size": vocab_size},
                "model": {"preset": "debug", "context_length": 16},
            },
        )

    def stages(self, config: PipelineConfig | None = None, **given: Any) -> DataStages:
        return DataStages(config or self.config(), self.data, say=self.said.append, **given)

    def run(self, config: PipelineConfig | None = None) -> dict[str, str]:
        """Run the stages and return the first line that each of them said."""
        self.said = []
        self.stages(config).run()
        first: dict[str, str] = {}
        for line in self.said:
            name, _, words = line.partition(": ")
            first.setdefault(name, words)
        return first

    def contents(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.data.iterdir())}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


UP_TO_DATE = {
    "corpus": "up to date (source, validation_period, separator, files unchanged)",
    "tokenizer": "up to date (vocab_size, special_tokens, corpus unchanged)",
    "tokens": "up to date (tokenizer, corpus unchanged)",
}


def test_a_second_run_does_nothing_and_says_why(bench: Bench) -> None:
    assert set(bench.run().values()) == {"runs, not done yet"}
    before = bench.contents()
    assert bench.run() == UP_TO_DATE
    assert bench.contents() == before
    data = bench.stages().existing()
    assert data.tokenizer.vocab_size == 300
    found = np.load(data.paths["train"])
    told = [piece for piece in read_corpus(bench.config().corpus) if piece.split == "train"]
    assert data.tokenizer.decode(found.tolist()) == "".join(p.text + END_OF_TEXT for p in told)


def test_another_vocabulary_is_another_tokenizer_and_other_tokens(bench: Bench) -> None:
    bench.run()
    assert bench.run(bench.config(vocab_size=290)) == UP_TO_DATE | {
        "tokenizer": "runs, vocab_size changed from 300 to 290",
        "tokens": "runs, tokenizer changed",
    }


def test_a_text_that_was_touched_is_read_but_not_encoded_again(bench: Bench) -> None:
    bench.run()
    os.utime(bench.text, ns=(1, 1))
    assert bench.run() == UP_TO_DATE | {"corpus": "runs, files changed"}


def test_a_text_that_has_grown_is_encoded_again(bench: Bench) -> None:
    bench.run()
    bench.write(41)
    # One more story teaches the tokenizer nothing: it comes out the same.
    assert bench.run() == {
        "corpus": "runs, files changed",
        "tokenizer": "runs, corpus changed",
        "tokens": "runs, corpus changed",
    }


def test_another_split_is_another_corpus(bench: Bench) -> None:
    bench.run()
    assert bench.run(bench.config(validation_period=2)) == {
        "corpus": "runs, validation_period changed from 20 to 2",
        "tokenizer": "runs, corpus changed",
        "tokens": "runs, tokenizer changed, corpus changed",
    }


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("corpus.json", "corpus"),
        ("tokenizer.json", "tokenizer"),
        ("tokenizer.about.json", "tokenizer"),
        ("train.npy", "tokens"),
        ("validation.json", "tokens"),
    ],
)
@pytest.mark.parametrize("is_missing", [True, False])
def test_a_lost_or_damaged_file_is_made_again(
    bench: Bench, name: str, stage: str, is_missing: bool
) -> None:
    bench.run()
    before = bench.contents()
    if is_missing:
        (bench.data / name).unlink()
    else:
        data = bytearray((bench.data / name).read_bytes())
        data[-3] ^= 1
        (bench.data / name).write_bytes(data)
    reason = "is missing" if is_missing else "is not as it was written"
    assert bench.run() == UP_TO_DATE | {stage: f"runs, {name} {reason}"}
    assert (bench.data / name).read_bytes() == before[name]


def test_builtin_text_depends_on_its_size_and_seed(bench: Bench) -> None:
    config = replace(bench.config(), corpus=CorpusConfig(megabytes=0.02))
    bench.run(config)
    assert bench.run(config)["corpus"].startswith("up to date (source, validation_period, mega")
    other = replace(config, corpus=CorpusConfig(megabytes=0.02, seed=1))
    assert bench.run(other)["corpus"] == "runs, seed changed from 0 to 1"


def test_a_download_that_was_deleted_is_fetched_again(bench: Bench, tmp_path: Path) -> None:
    def read(config: CorpusConfig) -> Iterator[Piece]:
        for split, path in zip(SPLITS, source_files(config), strict=True):
            if not path.exists():
                path.write_text("\n".join(islice(stories(0), 20)))
            yield Piece(path.read_text(), True, split)

    config = bench.config(source="tinystories", download_dir=str(tmp_path))
    bench.stages(config, read=read).run()
    name = "TinyStoriesV2-GPT4-valid.txt"
    (tmp_path / name).unlink()
    bench.said = []
    bench.stages(config, read=read).run()
    assert bench.said[0] == f"corpus: runs, {name} is missing"
    assert bench.said[-1] == f"tokens: {UP_TO_DATE['tokens']}"


def test_a_small_text_yields_fewer_ids_and_says_so(bench: Bench) -> None:
    bench.write(3)
    data = bench.stages(bench.config(vocab_size=5000)).run()
    assert data.tokenizer.vocab_size < 1000
    asked = f"{data.tokenizer.vocab_size} of 5000 ids"
    assert f"tokenizer: the corpus has no more pairs to merge after {asked}" in bench.said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "corpus: file:PATH must hold text, got "),
        (b"one \xff two", "text.txt must be UTF-8 text, got byte 0xff at offset 4"),
        (b"one", "corpus: text must hold at least 2 documents, one for each split, got 'none for"),
        (
            f"{'a' * 99}{END_OF_TEXT}b".encode(),
            "context_length + 1 = 17 tokens for train, got 'at most 2'",
        ),
    ],
)
def test_a_text_that_will_not_do_is_one_line_before_anything_is_trained(
    bench: Bench, text: bytes, message: str
) -> None:
    bench.run()
    before = bench.contents()
    bench.text.write_bytes(text)
    bench.said = []
    with pytest.raises(UsageError) as caught:
        bench.stages().run()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [line for line in bench.said if line.startswith("tokenizer")]
    after = bench.contents()
    assert {n: b for n, b in after.items() if not n.startswith("corpus")} == {
        n: b for n, b in before.items() if not n.startswith("corpus")
    }
    assert list(after) == list(before)


def test_tokens_that_are_fewer_than_a_context(bench: Bench) -> None:
    # Of more bytes than a context, so that only encoding shows how few tokens they are.
    bench.text.write_text(END_OF_TEXT.join(["word " * 10, "word " * 90]))
    with pytest.raises(UsageError, match=r"hold at least context_length \+ 1 = 17 tokens, got"):
        bench.stages(bench.config(vocab_size=1000, validation_period=99)).run()


def test_an_interrupted_stage_leaves_the_files_of_before(bench: Bench) -> None:
    bench.run()
    before = bench.contents()
    num_readings = 0

    def read(config: CorpusConfig) -> Iterator[Piece]:
        nonlocal num_readings
        num_readings += 1
        yield from read_corpus(config)
        if num_readings == 2:
            raise KeyboardInterrupt

    bench.write(50)
    with pytest.raises(KeyboardInterrupt):
        bench.stages(read=read).run()
    after = bench.contents()
    assert after.pop("corpus.json") != before.pop("corpus.json")
    assert after.pop("corpus.stage.json") != before.pop("corpus.stage.json")
    assert after == before
    assert bench.run()["corpus"] == UP_TO_DATE["corpus"]
    assert bench.run() == UP_TO_DATE


def test_a_full_disk_is_one_line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bench.run()
    before = bench.contents()
    bench.write(50)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"corpus.json cannot be written: No space left on device"):
        bench.stages().run()
    assert bench.contents() == before


def other_tokenizer(bench: Bench) -> None:
    bpe.train(read_corpus(bench.config().corpus), 280).save(bench.stages().tokenizer_path)


def other_tokens(bench: Bench) -> None:
    other = bpe.train(read_corpus(bench.config().corpus), 280)
    encode_corpus(read_corpus(bench.config().corpus), other, bench.data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda bench: (bench.data / "tokenizer.json").unlink(), "tokenizer.json: No such file"),
        (lambda bench: (bench.data / "train.npy").unlink(), "train.npy cannot be read: No such"),
        (lambda bench: (bench.data / "train.json").write_text("{"), "train.json is damaged"),
        (other_tokenizer, "must be encoded by the tokenizer with sha256"),
        (other_tokens, "must be encoded by the tokenizer with sha256"),
    ],
)
def test_data_of_before_that_will_not_do(bench: Bench, spoil: Any, message: str) -> None:
    bench.run()
    spoil(bench)
    with pytest.raises(UsageError) as caught:
        bench.stages().existing()
    assert str(caught.value).startswith("skip_data: needs the files of an earlier run: tok")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_data_of_before_is_used_whatever_the_text_is_now(bench: Bench) -> None:
    bench.run()
    before = bench.contents()
    bench.text.unlink()
    assert bench.stages().existing().infos["train"].vocab_size == 300
    assert bench.contents() == before
