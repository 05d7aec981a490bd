"""Do token files hold the corpus, and does loading refuse every other file?"""

from __future__ import annotations

import errno
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cs336_systems.errors import UsageError
from cs336_systems.train import corpus, tokens
from cs336_systems.train.corpus import END_OF_TEXT, SPLITS, Piece
from cs336_systems.train.stories import stories
from cs336_systems.train.tokenizer import BpeTokenizer, train
from cs336_systems.train.tokens import (
    encode_corpus,
    info_path,
    load_info,
    load_tokens,
    token_dtype,
)

FILES = ["train.json", "train.npy", "validation.json", "validation.npy"]


def told(num_documents: int) -> list[Piece]:
    """Stories, every fifth one for validation."""
    texts = zip(range(num_documents), stories(0), strict=False)
    return [Piece(text, True, SPLITS[i % 5 == 0]) for i, text in texts]


@functools.cache
def tokenizer() -> BpeTokenizer:
    return train(told(50), 500)


def written(folder: Path, num_documents: int = 50) -> Path:
    encode_corpus(told(num_documents), tokenizer(), folder)
    return folder / "train.npy"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def load(path: Path, **options: bool) -> np.ndarray:
    return load_tokens(
        path, tokenizer_sha256=tokenizer().sha256, context_length=16, verify=True, **options
    )


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, "u1"), (257, "u2"), (65_536, "u2"), (65_537, "u4"), (151_936, "u4")],
)
def test_the_smallest_type_that_fits(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)


def test_the_files_hold_each_split(tmp_path: Path) -> None:
    infos = encode_corpus(told(50), tokenizer(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    for split in SPLITS:
        found = load(tmp_path / f"{split}.npy")
        assert isinstance(found, np.memmap)
        assert found.dtype == np.uint16
        texts = [piece.text for piece in told(50) if piece.split == split]
        assert tokenizer().decode(found.tolist()) == "".join(text + END_OF_TEXT for text in texts)
        assert infos[split] == load_info(tmp_path / f"{split}.npy")
        assert infos[split].num_documents == len(texts)
        assert infos[split].num_tokens == len(found)
        assert found.tolist().count(tokenizer().end_of_text) == len(texts)


def test_processes_and_batches_make_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "one", 300)
    monkeypatch.setattr(tokens, "_BATCH_CHARS", 5000)
    encode_corpus(told(300), tokenizer(), tmp_path / "two", num_processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_no_more_is_read_than_is_on_its_way() -> None:
    num_read = 0

    def batches() -> Iterator[list[Piece]]:
        nonlocal num_read
        for piece in told(40):
            num_read += 1
            yield [piece]

    encoded = tokens._encode_all(batches(), tokenizer(), 2)
    for num_done in range(1, 11):
        # One result for each split of a batch.
        next(encoded), next(encoded)
        assert num_read <= num_done + 2 * tokens._BATCHES_PER_PROCESS
    encoded.close()


@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("ab '\n\t.\x1c"))))
@example(text="it's\x1c \u180e\n \u3000\n")
def test_a_document_cut_before_a_space_has_the_tokens_of_the_whole(text: str) -> None:
    # The last space is after a letter, so that there is always a place to cut.
    text += "c d"
    places = [match.start() for match in corpus._BREAK.finditer(text)]
    assert places
    for place in places:
        parts = tokenizer().encode_batch([text[:place], text[place:]], special=False)
        assert [*parts[0], *parts[1]] == tokenizer().encode(text, special=False)


def test_a_boundary_inside_a_document_is_mere_text(tmp_path: Path) -> None:
    pieces = [Piece(f"a{END_OF_TEXT}b", True, split) for split in SPLITS]
    encode_corpus(pieces, tokenizer(), tmp_path)
    found = np.load(tmp_path / "train.npy").tolist()
    assert found.count(tokenizer().end_of_text) == 1
    assert found[-1] == tokenizer().end_of_text


def test_a_corpus_too_small_to_split_leaves_the_files_of_before(tmp_path: Path) -> None:
    written(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="at least 2 documents, one for each split, got 'none for"):
        encode_corpus(told(1), tokenizer(), tmp_path)
    assert contents(tmp_path) == before


def test_a_broken_corpus_leaves_the_files_of_before(tmp_path: Path) -> None:
    def broken() -> Iterator[Piece]:
        yield from told(9)
        raise UsageError("corpus: the text ended badly")

    written(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="the text ended badly"):
        encode_corpus(broken(), tokenizer(), tmp_path)
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_the_files_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written(tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"\.npy cannot be written: No space left on device$"):
        encode_corpus(told(20), tokenizer(), tmp_path)
    assert contents(tmp_path) == before


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _keep_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _other_type(path: Path) -> None:
    np.save(path, np.load(path).astype(np.int64))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "must have tokens of sha256"),
        (_keep_half, "train.npy is damaged: "),
        (_other_type, "must hold [0-9]+ of uint16, got '[0-9]+ of int64'"),
        (lambda path: path.write_bytes(b""), "train.npy is damaged: "),
        (lambda path: path.unlink(), "train.npy cannot be read: No such file"),
        (lambda path: info_path(path).unlink(), "train.json: No such file"),
        (lambda path: info_path(path).write_text("{}"), "train.json is damaged: "),
        (lambda path: info_path(path).write_text("{"), "train.json is damaged: "),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage, message: str) -> None:
    path = written(tmp_path)
    damage(path)
    with pytest.raises(UsageError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    other = train(told(50), 400).sha256
    with pytest.raises(UsageError, match=f"tokenizer with sha256 {other}, got '[0-9a-f]{{64}}'"):
        load_tokens(path, tokenizer_sha256=other, context_length=16)


def test_a_dataset_holds_at_least_one_window(tmp_path: Path) -> None:
    path = written(tmp_path)
    num_tokens = load_info(path).num_tokens
    sha256 = tokenizer().sha256
    assert len(load_tokens(path, tokenizer_sha256=sha256, context_length=num_tokens - 1))
    message = rf"at least context_length \+ 1 = {num_tokens + 1} tokens, got {num_tokens}$"
    with pytest.raises(UsageError, match=message):
        load_tokens(path, tokenizer_sha256=sha256, context_length=num_tokens)


def test_there_is_at_least_one_process(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="num_processes must be at least 1, got 0"):
        encode_corpus(told(9), tokenizer(), tmp_path, num_processes=0)


def test_the_description_is_plain_json(tmp_path: Path) -> None:
    described = json.loads(info_path(written(tmp_path)).read_text())
    assert described["tokenizer_sha256"] == tokenizer().sha256
    assert described["vocab_size"] == 500
