"""Text to train on, streamed as documents: shipped with Python, from files, or TinyStories."""

from __future__ import annotations

import ast
import codecs
import glob
import importlib.util
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from cs336_systems.errors import UsageError, bad
from cs336_systems.train.download import Patience, download
from cs336_systems.train.stories import stories

END_OF_TEXT = "<|endoftext|>"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

# A document's piece is held in memory whole; longer documents come in several.
PIECE_CHARS = 1 << 18
_READ_BYTES = 1 << 18
# How far back from the longest piece a place to cut is looked for.
_BREAK_CHARS = 1 << 12
# No pre-token of byte-level BPE crosses from a word into the space after it, so that a document cut
# here has the same tokens as a whole one.
_BREAK = re.compile(r"(?<=\S)[ \n]")

# A revision that cannot change, and what its files are.
TINYSTORIES_URL = (
    "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/"
    "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
)
_TINYSTORIES_FILES: dict[Split, str] = {
    "train": "TinyStoriesV2-GPT4-train.txt",
    "validation": "TinyStoriesV2-GPT4-valid.txt",
}
_TINYSTORIES_SHA256: dict[Split, str] = {
    "train": "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
    "validation": "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d",
}
# Modules of the standard library whose source has much prose in it.
_PROSE_MODULES = [
    "argparse",
    "ast",
    "asyncio.base_events",
    "collections",
    "concurrent.futures.process",
    "contextlib",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "email.message",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "http.client",
    "inspect",
    "ipaddress",
    "json",
    "logging",
    "mailbox",
    "pathlib",
    "pickletools",
    "random",
    "shutil",
    "socket",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "typing",
    "unittest.case",
    "urllib.request",
]


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends_document: bool
    split: Split


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where the text comes from, checked on creation.

    Raises: UsageError naming the field that breaks a rule.
    """

    # `builtin`, `tinystories`, or `file:` with a file, a folder of .txt files or a glob pattern.
    source: str = "builtin"
    # Size of the builtin text, in 10^6 bytes of UTF-8.
    megabytes: float = 4.0
    # Of the builtin stories.
    seed: int = 0
    # Between the documents of a file.
    separator: str = END_OF_TEXT
    # One document in so many is kept for validation; TinyStories has a file for that.
    validation_period: int = 20
    # Where downloads are kept.
    download_dir: str = "data"

    def __post_init__(self) -> None:
        if self.source not in ("builtin", "tinystories") and not re.match("file:.", self.source):
            raise bad("corpus", "source", "be builtin, tinystories or file:PATH", self.source)
        if not self.megabytes > 0:
            raise bad("corpus", "megabytes", "be positive", self.megabytes)
        if self.validation_period < 2:
            raise bad("corpus", "validation_period", "be at least 2", self.validation_period)
        if not self.separator:
            raise bad("corpus", "separator", "be some text", self.separator)


def read_corpus(
    config: CorpusConfig, *, url: str = TINYSTORIES_URL, patience: Patience | None = None
) -> Iterator[Piece]:
    """Yield the corpus in order, of any size in little memory.

    Raises: UsageError for a file that is missing, empty or not UTF-8, or a download that fails.
    """
    if config.source == "tinystories":
        for split, name in _TINYSTORIES_FILES.items():
            # Another server, a mirror say, may have another version.
            sha256 = _TINYSTORIES_SHA256[split] if url == TINYSTORIES_URL else None
            path = Path(config.download_dir) / name
            download(f"{url}/{name}", path, sha256=sha256, patience=patience)
            for text, ends in read_file(path, END_OF_TEXT):
                yield Piece(text, ends, split)
        return
    parts = _builtin(config) if config.source == "builtin" else _files(config)
    yield from _assign(parts, config.validation_period)


def _assign(parts: Iterable[tuple[str, bool]], period: int) -> Iterator[Piece]:
    """Give whole documents to the splits, the first one to validation: two documents fill both."""
    index = 0
    for text, ends in parts:
        yield Piece(text, ends, "train" if index % period else "validation")
        index += ends


def _builtin(config: CorpusConfig) -> Iterator[tuple[str, bool]]:
    """Real text first, up to half of the whole; then stories."""
    wanted = int(config.megabytes * 1e6)
    so_far = 0
    for text in real_text():
        if so_far + len(text.encode()) > wanted // 2:
            break
        so_far += len(text.encode())
        yield from cut([text], END_OF_TEXT)
    for text in stories(config.seed):
        if so_far >= wanted:
            return
        so_far += len(text.encode())
        yield text, True


def real_text() -> Iterator[str]:
    """Yield the English that comes with this Python: reference, docstrings, licence."""
    if importlib.util.find_spec("pydoc_data"):
        from pydoc_data import topics

        yield from (text.strip() for _, text in sorted(topics.topics.items()))
    for name in _PROSE_MODULES:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin and spec.origin.endswith(".py"):
            yield from _docstrings(Path(spec.origin))
    licence = Path(ast.__file__).with_name("LICENSE.txt")
    if licence.exists():
        yield licence.read_text(encoding="utf-8").strip()


def _docstrings(source: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(source.read_bytes()))
        if isinstance(node, documented)
    ]
    yield "\n\n".join(text for text in texts if text.isascii() and len(text) > 80)


def _files(config: CorpusConfig) -> Iterator[tuple[str, bool]]:
    for path in source_files(config):
        yield from read_file(path, config.separator)


def source_files(config: CorpusConfig) -> list[Path]:
    """Return the files that the text is read from, those to be downloaded among them.

    Raises: UsageError when `file:PATH` names none.
    """
    if config.source == "builtin":
        return []
    if config.source == "tinystories":
        return [Path(config.download_dir) / name for name in _TINYSTORIES_FILES.values()]
    pattern = config.source.removeprefix("file:")
    if Path(pattern).is_dir():
        paths = sorted(Path(pattern).glob("*.txt"))
    elif Path(pattern).exists():
        paths = [Path(pattern)]
    else:
        paths = [Path(path) for path in sorted(glob.glob(pattern))]
    if not paths:
        raise bad("corpus", "file:PATH", "name text files", pattern)
    return paths


def read_file(path: Path, separator: str) -> Iterator[tuple[str, bool]]:
    """Yield the file's documents, as pieces with whether a document ends there.

    Raises: UsageError for a file that cannot be read, holds no text, or is not UTF-8.
    """
    is_empty = True
    for part in cut(_decoded(path), separator):
        is_empty = False
        yield part
    if is_empty:
        raise bad("corpus", "file:PATH", "hold text", f"{path} (no text in it)")


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with path.open("rb") as file:
            for chunk in iter(lambda: file.read(_READ_BYTES), b""):
                pending = len(decoder.getstate()[0])
                yield decoder.decode(chunk)
                offset += len(chunk)
            pending = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"corpus: {path} must be UTF-8 text, got byte {error.object[error.start]:#04x} "
            f"at offset {offset - pending + error.start}"
        ) from error
    except OSError as error:
        raise UsageError(f"corpus: {path} cannot be read: {error.strerror}") from error


def cut(chunks: Iterable[str], separator: str) -> Iterator[tuple[str, bool]]:
    """Cut streamed text into documents at `separator`, and long documents into pieces.

    A document's text is kept but for line breaks at its ends; blank documents are left out.
    """
    rest, is_open = "", False
    for chunk in chunks:
        *ended, rest = (rest + chunk).split(separator)
        for text in ended:
            yield from _pieces(text, is_open)
            is_open = False
        # The separator's beginning may be at the end of what has come so far.
        while len(rest) > PIECE_CHARS + len(separator):
            text, rest = _break(rest)
            if not is_open:
                text = text.lstrip("\r\n")
            if is_open or text.strip():
                yield text, False
                is_open = True
    yield from _pieces(rest, is_open)


def _pieces(text: str, is_open: bool) -> Iterator[tuple[str, bool]]:
    """Yield the end of a document."""
    if not is_open and not text.strip():
        return
    text = text.rstrip("\r\n") if is_open else text.strip("\r\n")
    while len(text) > PIECE_CHARS:
        head, text = _break(text)
        yield head, False
        is_open = True
    yield text, True


def _break(text: str) -> tuple[str, str]:
    places = list(_BREAK.finditer(text, PIECE_CHARS - _BREAK_CHARS, PIECE_CHARS))
    end = places[-1].start() if places else PIECE_CHARS
    return text[:end], text[end:]
