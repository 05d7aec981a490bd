"""The stages before training: corpus, tokenizer, tokens."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cs336_systems.errors import UsageError, bad
from cs336_systems.train import corpus, stories
from cs336_systems.train import tokenizer as bpe
from cs336_systems.train.atomic import replacing
from cs336_systems.train.config import CorpusConfig, PipelineConfig
from cs336_systems.train.corpus import SPLITS, Piece, Split, read_corpus, source_files
from cs336_systems.train.download import file_sha256
from cs336_systems.train.stages import Stage, file_facts
from cs336_systems.train.tokenizer import BpeTokenizer
from cs336_systems.train.tokens import TokensInfo, encode_corpus, info_path, load_info, load_tokens

Say = Callable[[str], None]
Read = Callable[[CorpusConfig], Iterable[Piece]]


@dataclass(frozen=True)
class Data:
    """What training starts from."""

    tokenizer: BpeTokenizer
    # Token files and their descriptions, by split.
    paths: dict[Split, Path]
    infos: dict[Split, TokensInfo]


@dataclass
class CorpusFacts:
    """What one reading of the whole corpus has shown."""

    # Of every text, its split and where documents end.
    sha256: str = ""
    num_chars: int = 0
    num_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    num_documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> CorpusFacts:
        """Read a corpus to its end."""
        facts, hashed = cls(), hashlib.sha256()
        for piece in pieces:
            data = piece.text.encode()
            hashed.update(data)
            # Bytes that UTF-8 never has: the same text cut otherwise is another corpus.
            hashed.update(bytes([0xFE + piece.ends_document, SPLITS.index(piece.split)]))
            facts.num_chars += len(piece.text)
            facts.num_bytes[piece.split] += len(data)
            facts.num_documents[piece.split] += piece.ends_document
        facts.sha256 = hashed.hexdigest()
        return facts


@dataclass(frozen=True)
class DataStages:
    """The three stages of one config, whose files all lie in `folder`."""

    config: PipelineConfig
    folder: Path
    say: Say = print
    read: Read = read_corpus

    @property
    def corpus_path(self) -> Path:
        """The corpus' facts; the text stays where it is."""
        return self.folder / "corpus.json"

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer, in the library's own format."""
        return self.folder / "tokenizer.json"

    @property
    def token_paths(self) -> dict[Split, Path]:
        """The token file of each split."""
        return {split: self.folder / f"{split}.npy" for split in SPLITS}

    def run(self) -> Data:
        """Bring all three up to date.

        Raises: UsageError for text, vocabulary or disk that will not do, in one line.
        """
        facts = self._corpus()
        self._refuse_what_is_too_short(facts)
        tokenizer = self._tokenizer(facts)
        self._tokens(facts, tokenizer)
        return self._data(tokenizer)

    def existing(self) -> Data:
        """Return what an earlier run made, without a look at the corpus.

        Raises: UsageError when it is missing, damaged, or not of one tokenizer.
        """
        try:
            return self._data(BpeTokenizer.load(self.tokenizer_path))
        except UsageError as error:
            raise UsageError(f"skip_data: needs the files of an earlier run: {error}") from error

    def _data(self, tokenizer: BpeTokenizer) -> Data:
        context_length = self.config.model.config(tokenizer.vocab_size).context_length
        for path in self.token_paths.values():
            load_tokens(path, tokenizer_sha256=tokenizer.sha256, context_length=context_length)
        infos = {split: load_info(path) for split, path in self.token_paths.items()}
        return Data(tokenizer, self.token_paths, infos)

    def _corpus(self) -> CorpusFacts:
        config = self.config.corpus
        files = source_files(config)
        downloads = files if config.source == "tinystories" else []
        stage = Stage(
            name="corpus",
            folder=self.folder,
            inputs=_corpus_inputs(config),
            outputs=(self.corpus_path, *downloads),
        )

        def work() -> None:
            total = sum(path.stat().st_size for path in files if path.exists())
            facts = CorpusFacts.of(
                self._shown("corpus", total or int(config.megabytes * 1e6), self.read(config))
            )
            with replacing(self.corpus_path) as file:
                file.write(json.dumps(asdict(facts), indent=2).encode() + b"\n")

        stage.run(work, self.say)
        return CorpusFacts(**json.loads(self.corpus_path.read_bytes()))

    def _refuse_what_is_too_short(self, facts: CorpusFacts) -> None:
        """Say so before the tokenizer is trained, where it is certain: a token has a byte."""
        least = self.config.model.config(self.config.tokenizer.vocab_size).context_length + 1
        for split in SPLITS:
            if not facts.num_documents[split]:
                rule = "hold at least 2 documents, one for each split"
                raise bad("corpus", "text", rule, f"none for {split}")
            most = facts.num_bytes[split] + facts.num_documents[split]
            if most < least:
                rule = f"hold at least context_length + 1 = {least} tokens for {split}"
                raise bad("corpus", "text", rule, f"at most {most}")

    def _tokenizer(self, facts: CorpusFacts) -> BpeTokenizer:
        config = self.config.tokenizer
        path = self.tokenizer_path
        stage = Stage(
            name="tokenizer",
            folder=self.folder,
            inputs={
                "vocab_size": config.vocab_size,
                "special_tokens": config.special_tokens,
                "corpus": facts.sha256,
            },
            outputs=(path, bpe.about_path(path)),
        )

        def work() -> None:
            pieces = self._shown("tokenizer", facts.num_chars, self.read(self.config.corpus))
            trained = bpe.train(pieces, config.vocab_size, config.special_tokens)
            trained.save(path)
            if trained.vocab_size < config.vocab_size:
                asked = f"{trained.vocab_size} of {config.vocab_size} ids"
                self.say(f"tokenizer: the corpus has no more pairs to merge after {asked}")

        stage.run(work, self.say)
        return BpeTokenizer.load(path)

    def _tokens(self, facts: CorpusFacts, tokenizer: BpeTokenizer) -> None:
        paths = list(self.token_paths.values())
        stage = Stage(
            name="tokens",
            folder=self.folder,
            inputs={"tokenizer": tokenizer.sha256, "corpus": facts.sha256},
            outputs=(*paths, *map(info_path, paths)),
        )

        def work() -> None:
            pieces = self._shown("tokens", facts.num_chars, self.read(self.config.corpus))
            encode_corpus(pieces, tokenizer, self.folder, self.config.tokens.num_processes)

        stage.run(work, self.say)

    def _shown(self, name: str, num_chars: int, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Pass pieces on under a progress bar, on a terminal only."""
        hidden = None if self.config.logging.progress else True
        with tqdm(total=num_chars, unit="B", unit_scale=True, desc=name, disable=hidden) as bar:
            for piece in pieces:
                yield piece
                bar.update(len(piece.text))


def _corpus_inputs(config: CorpusConfig) -> dict[str, Any]:
    """Return what decides the text, and where it is cut."""
    if config.source == "tinystories":
        return {"source": config.source, "download_dir": config.download_dir}
    inputs = {"source": config.source, "validation_period": config.validation_period}
    if config.source == "builtin":
        made_by = [file_sha256(Path(inspect.getfile(module))) for module in (corpus, stories)]
        return inputs | {
            "megabytes": config.megabytes,
            "seed": config.seed,
            "python": platform.python_version(),
            "generator": made_by,
        }
    files = [file_facts(path) for path in source_files(config)]
    return inputs | {"separator": config.separator, "files": files}
