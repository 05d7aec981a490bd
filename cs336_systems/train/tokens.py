"""A corpus as token files: `.npy` arrays in the smallest type, mapped and not read when loaded."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cs336_systems.errors import UsageError, bad
from cs336_systems.train.atomic import replacing
from cs336_systems.train.corpus import SPLITS, Piece, Split
from cs336_systems.train.tokenizer import BpeTokenizer

# Text in one unit of work; with the window below it bounds what is held at a time.
_BATCH_CHARS = 1 << 20
_BATCHES_PER_PROCESS = 2


@dataclass(frozen=True, kw_only=True)
class TokensInfo:
    """What a token file holds, kept as JSON beside it."""

    tokenizer_sha256: str
    vocab_size: int
    num_tokens: int
    num_documents: int
    # Of the tokens as they lie in the file.
    sha256: str


@dataclass(frozen=True)
class _Encoded:
    """Tokens of consecutive pieces of one split."""

    split: Split
    tokens: np.ndarray
    num_documents: int


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned type that holds every id."""
    return np.min_scalar_type(vocab_size - 1)


def info_path(path: Path) -> Path:
    """Where the description of the token file at `path` is kept."""
    return path.with_suffix(".json")


def encode_corpus(
    pieces: Iterable[Piece], tokenizer: BpeTokenizer, folder: Path, num_processes: int = 1
) -> dict[Split, TokensInfo]:
    """Write `train.npy` and `validation.npy`, each document closed by `<|endoftext|>`.

    One process encodes on the library's own threads. The files do not depend on their number.
    Raises: UsageError when a split gets no document or the disk refuses; earlier files stay.
    """
    if num_processes < 1:
        raise bad("tokens", "num_processes", "be at least 1", num_processes)
    dtype = token_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        files = {
            split: _TokenFile(stack.enter_context(replacing(folder / f"{split}.npy")), dtype)
            for split in SPLITS
        }
        for encoded in _encode_all(_batches(pieces), tokenizer, num_processes):
            files[encoded.split].append(encoded)
        for split, file in files.items():
            if not file.num_documents:
                rule = "hold at least 2 documents, one for each split"
                raise bad("tokens", "corpus", rule, f"none for {split}")
            file.finish()
        for split in SPLITS:
            # New tokens under an old description would be worse than none.
            info_path(folder / f"{split}.npy").unlink(missing_ok=True)
    infos = {split: file.info(tokenizer) for split, file in files.items()}
    for split, info in infos.items():
        with replacing(info_path(folder / f"{split}.npy")) as out:
            out.write(json.dumps(asdict(info), indent=2).encode() + b"\n")
    return infos


def load_tokens(
    path: Path, *, tokenizer_sha256: str, context_length: int, verify: bool = False
) -> np.ndarray:
    """Map a token file into memory; `verify` reads all of it to compare its sha256.

    Raises: UsageError for a file that is missing, damaged, made by another tokenizer, or shorter
        than one context and the token after it.
    """
    info = load_info(path)
    if info.tokenizer_sha256 != tokenizer_sha256:
        rule = f"be encoded by the tokenizer with sha256 {tokenizer_sha256}"
        raise bad("tokens", str(path), rule, info.tokenizer_sha256)
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UsageError(f"tokens: {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise UsageError(f"tokens: {path} is damaged: {error}") from error
    expected = ((info.num_tokens,), token_dtype(info.vocab_size))
    if (tokens.shape, tokens.dtype) != expected:
        got = f"{tokens.shape[0] if tokens.ndim else 'no'} of {tokens.dtype}"
        raise bad("tokens", str(path), f"hold {info.num_tokens} of {expected[1]}", got)
    if verify and (found := hashlib.sha256(tokens).hexdigest()) != info.sha256:
        raise bad("tokens", str(path), f"have tokens of sha256 {info.sha256}", found)
    if len(tokens) < context_length + 1:
        rule = f"hold at least context_length + 1 = {context_length + 1} tokens"
        raise bad("tokens", str(path), rule, len(tokens))
    return tokens


def load_info(path: Path) -> TokensInfo:
    """Read the description of the token file at `path`.

    Raises: UsageError when it is missing or damaged.
    """
    try:
        return TokensInfo(**json.loads(info_path(path).read_bytes()))
    except OSError as error:
        raise UsageError(f"tokens: {info_path(path)}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"tokens: {info_path(path)} is damaged: {error}") from error


class _TokenFile:
    """An `.npy` that grows: its header keeps room for the length, which is known at the end."""

    def __init__(self, file: BinaryIO, dtype: np.dtype) -> None:
        self.file, self.dtype = file, dtype
        self.num_tokens = self.num_documents = 0
        self.hash = hashlib.sha256()
        self._write_header()
        self.header_bytes = file.tell()

    def append(self, encoded: _Encoded) -> None:
        data = encoded.tokens.tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.num_tokens += len(encoded.tokens)
        self.num_documents += encoded.num_documents

    def finish(self) -> None:
        """Write the length, and let the disk say now whether it has room for it all."""
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() == self.header_bytes
        self.file.flush()
        os.fsync(self.file.fileno())

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.num_tokens,),
        }
        np.lib.format.write_array_header_1_0(self.file, header)

    def info(self, tokenizer: BpeTokenizer) -> TokensInfo:
        return TokensInfo(
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            sha256=self.hash.hexdigest(),
        )


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    num_chars = 0
    for piece in pieces:
        batch.append(piece)
        num_chars += len(piece.text)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _encode_all(
    batches: Iterator[list[Piece]], tokenizer: BpeTokenizer, num_processes: int
) -> Iterator[_Encoded]:
    """Yield the encoded batches in order, with a bounded number of them on their way."""
    if num_processes == 1:
        for batch in batches:
            yield from _encode(tokenizer, batch)
        return
    # Not forked: the library's threads, and torch's, do not survive a fork.
    pool = ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.json_text,),
    )
    try:
        running: deque[Future[list[_Encoded]]] = deque()
        for batch in batches:
            running.append(pool.submit(_encode_in_worker, batch))
            if len(running) >= _BATCHES_PER_PROCESS * num_processes:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(tokenizer: BpeTokenizer, batch: list[Piece]) -> list[_Encoded]:
    # A document's text cannot end the document: `<|endoftext|>` inside it is mere characters.
    ids = tokenizer.encode_batch([piece.text for piece in batch], special=False)
    encoded = []
    for split in SPLITS:
        mine = [(piece, own) for piece, own in zip(batch, ids, strict=True) if piece.split == split]
        for piece, own in mine:
            if piece.ends_document:
                own.append(tokenizer.end_of_text)
        tokens = np.fromiter(
            chain.from_iterable(own for _, own in mine), token_dtype(tokenizer.vocab_size)
        )
        encoded.append(_Encoded(split, tokens, sum(piece.ends_document for piece, _ in mine)))
    return encoded


# A worker's own tokenizer: made once in its process, not sent with each batch.
_worker_tokenizer: BpeTokenizer


def _start_worker(json_text: str) -> None:
    global _worker_tokenizer
    # A Ctrl-C reaches every process of the terminal; the one that feeds this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes are the parallelism; threads in each would fight for the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = BpeTokenizer(json_text)


def _encode_in_worker(batch: list[Piece]) -> list[_Encoded]:
    return _encode(_worker_tokenizer, batch)
