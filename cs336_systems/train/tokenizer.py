"""Byte-level BPE, trained with the `tokenizers` library: any bytes in, the same bytes out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cs336_systems.errors import UsageError, bad
from cs336_systems.train.atomic import replacing
from cs336_systems.train.corpus import END_OF_TEXT, Piece

NUM_BYTES = 256
# The pre-tokenizer parts the letter from the signs, so that no learned token can be the same text.
_SPECIAL = re.compile(r"<\|[a-z][a-z0-9_]*\|>")
# Pieces are handed to the trainer in lists of about this much text.
_BATCH_CHARS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """What a tokenizer has learned from."""

    corpus_sha256: str = ""
    num_documents: int = 0
    num_bytes: int = 0


class BpeTokenizer:
    """A trained tokenizer; its identity is the sha256 of its JSON."""

    def __init__(self, json_text: str, trained_on: TrainedOn | None = None) -> None:
        self.json_text = json_text
        self.trained_on = trained_on or TrainedOn()
        self.sha256 = hashlib.sha256(json_text.encode()).hexdigest()
        # One reads special tokens in a text as such, the other as the characters they are made of.
        self._special = Tokenizer.from_str(json_text)
        self._plain = Tokenizer.from_str(json_text)
        self._plain.encode_special_tokens = True
        added = self._special.get_added_tokens_decoder()
        self.special_tokens = {token.content: id_ for id_, token in sorted(added.items())}
        self._bytes_of_id = _byte_table(self._special, self.special_tokens)
        vocab = self._special.get_vocab()
        self._id_of_byte = [vocab[char] for char in _alphabet()]

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._bytes_of_id)

    @property
    def end_of_text(self) -> int:
        """The id that ends a document."""
        return self.special_tokens[END_OF_TEXT]

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of `text`; `special` reads `<|endoftext|>` and its like as single tokens.

        Raises: UsageError for a text that has no UTF-8 form.
        """
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Return the ids of each text, on as many threads as the library is allowed.

        Raises: UsageError for a text that has no UTF-8 form.
        """
        library = self._special if special else self._plain
        try:
            encodings = library.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise UsageError(f"tokenizer: text must have a UTF-8 form: {_reason(texts)}") from error
        return [encoding.ids for encoding in encodings]

    def encode_bytes(self, data: bytes, *, special: bool = True) -> list[int]:
        """Return ids that decode to `data`, be it UTF-8 or not."""
        ids: list[int] = []
        # Each byte outside UTF-8 comes as one lone surrogate, and is a token of its own.
        for part in re.split("([\udc80-\udcff])", data.decode(errors="surrogateescape")):
            if len(part) == 1 and "\udc80" <= part <= "\udcff":
                ids.append(self._id_of_byte[ord(part) - 0xDC00])
            elif part:
                ids += self.encode(part, special=special)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes that `ids` stand for, special tokens as their text.

        Raises: UsageError for an id outside the vocabulary.
        """
        ids = list(ids)
        for id_ in ids:
            if not 0 <= id_ < self.vocab_size:
                raise bad("tokenizer", "id", f"be in [0, {self.vocab_size})", id_)
        return b"".join(self._bytes_of_id[id_] for id_ in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text that `ids` stand for; bytes that are no UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, path: Path) -> None:
        """Write the library's own JSON to `path`, and what it was trained on beside it."""
        about = {
            "tokenizer_sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "special_tokens": self.special_tokens,
            "trained_on": asdict(self.trained_on),
        }
        with replacing(path) as file:
            file.write(self.json_text.encode())
        with replacing(about_path(path)) as file:
            file.write(json.dumps(about, indent=2).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> BpeTokenizer:
        """Read what `save` wrote.

        Raises: UsageError when either file is missing or damaged, or they do not belong together.
        """
        try:
            about = json.loads(about_path(path).read_bytes())
            found = cls(path.read_text(encoding="utf-8"), TrainedOn(**about["trained_on"]))
            expected = about["tokenizer_sha256"]
        except OSError as error:
            raise UsageError(f"tokenizer: {error.filename}: {error.strerror}") from error
        except Exception as error:  # the library raises bare Exceptions for its JSON
            raise UsageError(f"tokenizer: {path} is damaged: {error}") from error
        if found.sha256 != expected:
            raise bad("tokenizer", str(path), f"have sha256 {expected}", found.sha256)
        return found


def train(
    pieces: Iterable[Piece], vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)
) -> BpeTokenizer:
    """Learn merges from a corpus' training split, the same ones on every run.

    A small corpus may run out of pairs to merge; the vocabulary is then smaller than asked.
    Raises: UsageError for a vocabulary without room for every byte, a special token that text
        could be mistaken for, or a corpus without training text.
    """
    _check(vocab_size, special_tokens)
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False) for token in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    counter = _Counter()
    library.train_from_iterator(counter.batches(pieces), trainer)
    if not counter.num_bytes:
        raise bad("tokenizer", "corpus", "hold at least 2 documents, one to train on", "fewer")
    return BpeTokenizer(library.to_str(), counter.trained_on())


def about_path(path: Path) -> Path:
    """Where the description of the tokenizer at `path` is kept."""
    return path.with_suffix(".about.json")


class _Counter:
    """Hashes and counts what passes on its way to the trainer."""

    def __init__(self) -> None:
        self.num_documents = self.num_bytes = 0
        self.hash = hashlib.sha256()

    def batches(self, pieces: Iterable[Piece]) -> Iterator[list[str]]:
        batch: list[str] = []
        num_chars = 0
        for piece in pieces:
            if piece.split != "train":
                continue
            self._count(piece)
            batch.append(piece.text)
            num_chars += len(piece.text)
            if num_chars >= _BATCH_CHARS:
                yield batch
                batch, num_chars = [], 0
        yield batch

    def _count(self, piece: Piece) -> None:
        data = piece.text.encode()
        self.hash.update(data)
        # A byte that UTF-8 never has: the same text in other documents is another corpus.
        self.hash.update(b"\xff" if piece.ends_document else b"")
        self.num_bytes += len(data)
        self.num_documents += piece.ends_document

    def trained_on(self) -> TrainedOn:
        return TrainedOn(
            corpus_sha256=self.hash.hexdigest(),
            num_documents=self.num_documents,
            num_bytes=self.num_bytes,
        )


def _check(vocab_size: int, special_tokens: Sequence[str]) -> None:
    least = NUM_BYTES + len(special_tokens)
    if vocab_size < least:
        rule = f"be at least {least} (every byte and {len(special_tokens)} special)"
        raise bad("tokenizer", "vocab_size", rule, vocab_size)
    for token in special_tokens:
        if not _SPECIAL.fullmatch(token):
            raise bad("tokenizer", "special token", "look like <|name|>", token)
    if END_OF_TEXT not in special_tokens or len(set(special_tokens)) < len(special_tokens):
        rule = f"include {END_OF_TEXT} and be different"
        raise bad("tokenizer", "special_tokens", rule, list(special_tokens))


def _alphabet() -> list[str]:
    """Return the character that stands for each byte in a byte-level vocabulary.

    Printable bytes stand for themselves, the others for the characters from U+0100 on, in order.
    """
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(NUM_BYTES) if byte not in shown]
    return [chr(b) if b in shown else chr(NUM_BYTES + hidden.index(b)) for b in range(NUM_BYTES)]


def _byte_table(library: Tokenizer, special_tokens: dict[str, int]) -> list[bytes]:
    byte_of_char = {char: byte for byte, char in enumerate(_alphabet())}
    table = [b""] * library.get_vocab_size()
    for token, id_ in library.get_vocab().items():
        is_special = token in special_tokens
        table[id_] = token.encode() if is_special else bytes(byte_of_char[char] for char in token)
    return table


def _reason(texts: Sequence[str]) -> str:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"lone surrogate at character {error.start}"
    return "it is not a str"
