"""Is text streamed as the documents it is made of, and bad text refused in one line?"""

from __future__ import annotations

import random
import re
import tracemalloc
from itertools import islice
from pathlib import Path

import pytest
from http_faults import Faulty, serving
from hypothesis import example, given
from hypothesis import strategies as st

from cs336_systems.errors import UsageError
from cs336_systems.train import corpus
from cs336_systems.train.corpus import (
    END_OF_TEXT,
    PIECE_CHARS,
    TINYSTORIES_URL,
    CorpusConfig,
    Piece,
    cut,
    read_corpus,
    real_text,
)
from cs336_systems.train.download import Patience
from cs336_systems.train.stories import stories


def joined(parts: list[tuple[str, bool]]) -> list[str]:
    """Put the pieces of each document together."""
    documents = [""]
    for text, ends in parts:
        documents[-1] += text
        if ends:
            documents.append("")
    assert documents.pop() == "", "the last document never ended"
    return documents


def documents_of(config: CorpusConfig) -> list[str]:
    return joined([(piece.text, piece.ends_document) for piece in read_corpus(config)])


@given(
    texts=st.lists(st.text("ab \n<|é", max_size=12), max_size=6),
    separator=st.sampled_from([END_OF_TEXT, "\n\n", "|", "<|"]),
    seed=st.integers(0, 1000),
    piece_chars=st.integers(1, 8),
)
@example(texts=["a" * 20, " \n", "b c d e f"], separator="\n\n", seed=0, piece_chars=3)
def test_documents_do_not_depend_on_chunks_or_pieces(
    texts: list[str], separator: str, seed: int, piece_chars: int
) -> None:
    whole = separator.join(texts)
    expected = [text.strip("\r\n") for text in whole.split(separator) if text.strip()]
    rng = random.Random(seed)
    chunks, at = [], 0
    while at < len(whole):
        end = at + rng.randint(1, 7)
        chunks.append(whole[at:end])
        at = end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE_CHARS", piece_chars)
        parts = list(cut(chunks, separator))
    # A piece's own line breaks are stripped only at the document's ends.
    assert [text.strip() for text in joined(parts)] == [text.strip() for text in expected]
    assert all(len(text) <= piece_chars for text, _ in parts)
    assert joined(list(cut(chunks, separator))) == expected


def test_a_long_document_is_cut_before_a_space(tmp_path: Path) -> None:
    text = "word " * PIECE_CHARS + "end"
    (tmp_path / "a.txt").write_text(text)
    config = CorpusConfig(source=f"file:{tmp_path / 'a.txt'}")
    pieces = list(read_corpus(config))
    assert len(pieces) >= 5
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text.startswith(" word") for piece in pieces[1:-1])
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_builtin_is_real_text_then_stories_of_the_size_asked() -> None:
    first = list(read_corpus(CorpusConfig(megabytes=0.5, seed=3)))
    assert first == list(read_corpus(CorpusConfig(megabytes=0.5, seed=3)))
    assert first != list(read_corpus(CorpusConfig(megabytes=0.5, seed=4)))
    num_bytes = sum(len(piece.text.encode()) for piece in first)
    assert 0.5e6 <= num_bytes < 0.502e6
    assert first[0].text == next(real_text())
    told = set(islice(stories(3), 2000))
    share = sum(len(piece.text.encode()) for piece in first if piece.text in told) / num_bytes
    assert 0.5 <= share < 0.6


def test_no_text_holds_a_document_boundary() -> None:
    texts = [*real_text(), *islice(stories(0), 200)]
    assert not [text for text in texts if END_OF_TEXT in text]
    assert len(set(islice(stories(0), 2000))) == 2000


def test_builtin_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    # Python's syntax trees of its own modules would be the peak.
    monkeypatch.setattr(corpus, "_PROSE_MODULES", ())
    pieces = read_corpus(CorpusConfig(megabytes=2))
    next(pieces)
    tracemalloc.start()
    num_chars = sum(len(piece.text) for piece in pieces)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_chars > 1_900_000
    assert peak_bytes < 500_000


def test_validation_is_whole_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(END_OF_TEXT.join(f"document {i}" for i in range(10)))
    pieces = list(read_corpus(CorpusConfig(source=f"file:{tmp_path}", validation_period=4)))
    held_out = [piece.text for piece in pieces if piece.split == "validation"]
    assert held_out == ["document 0", "document 4", "document 8"]
    assert len(pieces) == 10


def test_a_folder_and_a_pattern_name_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(f"text of {name}")
    assert documents_of(CorpusConfig(source=f"file:{tmp_path}")) == [
        "text of a.txt",
        "text of b.txt",
    ]
    assert len(documents_of(CorpusConfig(source=f"file:{tmp_path}/*"))) == 3


@pytest.mark.parametrize("prefix", ["", "é" * (1 << 17), "x" * ((1 << 18) - 1), "x" * 300_000])
@pytest.mark.parametrize("tail", [b"\xff", b"\xc3", b"\xc3(", b"\xed\xa0\x80 lone surrogate"])
def test_a_file_that_is_not_utf8(tmp_path: Path, prefix: str, tail: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(prefix.encode() + tail)
    offset = len(prefix.encode())
    with pytest.raises(UsageError) as caught:
        documents_of(CorpusConfig(source=f"file:{path}"))
    assert str(caught.value) == (
        f"corpus: {path} must be UTF-8 text, got byte {tail[0]:#04x} at offset {offset}"
    )


@pytest.mark.parametrize("text", ["", " \n\n", END_OF_TEXT, f"\n{END_OF_TEXT}\n"])
def test_a_file_without_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match="file:PATH must hold text, got"):
        documents_of(CorpusConfig(source=f"file:{path}"))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"file:PATH must name text files, got '.*/none'$"):
        documents_of(CorpusConfig(source=f"file:{tmp_path}/none"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "web"}, "source must be builtin, tinystories or file:PATH, got 'web'"),
        ({"source": "file:"}, "source must be builtin, tinystories or file:PATH, got 'file:'"),
        ({"megabytes": 0}, "megabytes must be positive, got 0"),
        ({"megabytes": float("nan")}, "megabytes must be positive, got nan"),
        ({"validation_period": 1}, "validation_period must be at least 2, got 1"),
        ({"separator": ""}, "separator must be some text, got ''"),
    ],
)
def test_a_config_that_breaks_a_rule(fields: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        CorpusConfig(**fields)
    assert str(caught.value) == f"corpus: {message}"


def test_the_public_files_are_asked_for_with_their_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str | None] = {}

    def download(url: str, path: Path, *, sha256: str | None, patience: object) -> None:
        asked[url] = sha256
        path.write_text("A story.")

    monkeypatch.setattr("cs336_systems.train.corpus.download", download)
    config = CorpusConfig(source="tinystories", download_dir=str(tmp_path))
    assert [piece.text for piece in read_corpus(config)] == ["A story.", "A story."]
    assert list(asked) == [
        f"{TINYSTORIES_URL}/TinyStoriesV2-GPT4-{split}.txt" for split in ("train", "valid")
    ]
    assert all(re.fullmatch("[0-9a-f]{64}", sha256 or "") for sha256 in asked.values())
    assert len(set(asked.values())) == 2


def test_tinystories_is_downloaded_once_and_split_by_file(tmp_path: Path) -> None:
    body = f"One.\n{END_OF_TEXT}\nTwo.\n{END_OF_TEXT}\n".encode()
    config = CorpusConfig(source="tinystories", download_dir=str(tmp_path))
    with serving(Faulty(body, ["drop"], drop_after=7)) as faulty:
        patience = Patience(backoff_s=0.001)
        pieces = list(read_corpus(config, url=faulty.url, patience=patience))
        again = list(read_corpus(config, url=faulty.url, patience=patience))
    assert (
        pieces
        == again
        == [
            Piece(text, True, split)
            for split in ("train", "validation")
            for text in ("One.", "Two.")
        ]
    )
    assert faulty.ranges == [None, "bytes=7-", None]
