"""Is what a user gets wrong answered in one line, before work that it would waste?"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from pipeline_runs import StandIn, small, written

from cs336_systems.attention import ATTENTION
from cs336_systems.errors import UsageError
from cs336_systems.train import tokenizer as bpe
from cs336_systems.train.config import CorpusConfig
from cs336_systems.train.corpus import END_OF_TEXT, read_corpus
from cs336_systems.train.pipeline import main, run
from cs336_systems.train.pipeline_checks import with_ranks_of_environment
from cs336_systems.train.stories import stories

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]

TEXT = END_OF_TEXT.join(islice(stories(0), 30)).encode()
# Each is something that a user gave, and a part of the line that answers it.
BAD_OPTIONS: list[tuple[list[str], str]] = [
    (["--config", "none.json"], "config: none.json: No such file or directory"),
    (["--training.num_steps", "many"], "training: num_steps must be an integer, got 'many'"),
    (["--training.steps", "3"], "unrecognized arguments: --training.steps 3"),
    (["--tokenizer.vocab_size", "256"], "tokenizer: vocab_size must be at least 257"),
    (["--corpus.source", "web"], "source must be builtin, tinystories or file:PATH, got 'web'"),
    (["--corpus.source", "file:none.txt"], "file:PATH must name text files, got 'none.txt'"),
    (["--corpus.source", "file:empty.txt"], "file:PATH must hold text, got 'empty.txt"),
    (["--corpus.source", "file:latin.txt"], "latin.txt must be UTF-8 text, got byte 0xe9 at"),
    (["--corpus.source", "file:one.txt"], "text must hold at least 2 documents, one for each"),
    (["--model.context_length", "100000"], "tokens for train, got 'at most"),
    (["--model.context_length", "9000"], "context_length + 1 = 9001 tokens"),
    (["--training.num_ranks", "2"], "ddp_wrapper must communicate when num_ranks is 2"),
    (["--skip_data"], "skip_data: needs the files of an earlier run: tokenizer: "),
    (["--output_dir", "empty.txt"], "pipeline: empty.txt cannot be written: File exists"),
    (["--output_dir", "empty.txt/x"], "pipeline: empty.txt/x cannot be written: Not a directory"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_OPTIONS)
def test_bad_options_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    for name, text in {"empty": b"", "latin": b"caf\xe9", "one": b"one", "good": TEXT}.items():
        (tmp_path / f"{name}.txt").write_bytes(text)
    config = small(Path(), corpus={"source": "file:good.txt"})
    monkeypatch.chdir(tmp_path)
    path = written(config, Path())
    assert main(["--config", path, *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert "training" not in said.out
    assert not list(tmp_path.glob("out/**/*.npy.part"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json must be JSON: "),
        ("[]", "config: section must be a mapping of fields, got []"),
        ('{"trainning": {}}', "config: field must be one of name, output_dir, corpus, tokenizer,"),
        ('{"training": {"steps": 1}}', "training: field must be one of num_steps, batch_size,"),
        ('{"training": {"num_steps": "1"}}', "training: num_steps must be an integer, got '1'"),
        ('{"training": 3}', "training: section must be a mapping of fields, got 3"),
    ],
)
def test_a_bad_config_is_one_line_and_touches_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(text)
    assert main(["--config", "config.json"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert os.listdir(tmp_path) == ["config.json"]


def test_tokens_of_another_tokenizer_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path)
    run(config, train=StandIn())
    other = bpe.train(read_corpus(CorpusConfig(megabytes=0.02)), 280)
    other.save(tmp_path / "out" / "data" / "tokenizer.json")
    capsys.readouterr()
    assert main(["--config", written(config, tmp_path), "--skip_data"]) == 2
    assert "must be encoded by the tokenizer with sha256" in capsys.readouterr().err


ELSEWHERE = [name for name, row in ATTENTION.items() if row.unmet(device="cpu", dtype="bf16")]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_kernel_that_cannot_run_here_is_refused_before_any_work(
    tmp_path: Path, name: str
) -> None:
    config = small(tmp_path, training={"attention_kernel": name, "precision": "bf16"})
    with pytest.raises(UsageError, match=f"attention_kernel must run here: .*, got '{name}'$"):
        run(config, train=StandIn())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("num_gpus", "num_ranks", "message"),
    [
        (0, 1, "training: device must be cpu or null where no CUDA device is, got 'cuda'"),
        (1, 2, "num_ranks must be at most the 1 CUDA device here, or training.device be cpu"),
        (2, 4, "num_ranks must be at most the 2 CUDA devices here, or training.device be cpu"),
    ],
)
def test_fewer_gpus_than_asked_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_gpus: int, num_ranks: int, message: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    config = small(
        tmp_path,
        training={"device": "cuda", "num_ranks": num_ranks, "ddp_wrapper": "naive"},
    )
    with pytest.raises(UsageError, match=message):
        run(config, train=StandIn())
    assert not (tmp_path / "out").exists()


def test_a_launcher_says_how_many_ranks_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path, training={"ddp_wrapper": "naive"})
    two = replace(config, training=replace(config.training, num_ranks=2))
    assert with_ranks_of_environment(config) == config
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert with_ranks_of_environment(config) == with_ranks_of_environment(two) == two
    four = replace(config, training=replace(config.training, num_ranks=4))
    with pytest.raises(UsageError, match="num_ranks must be the 2 ranks that were launched, got 4"):
        with_ranks_of_environment(four)
    with pytest.raises(UsageError, match="ddp_wrapper must communicate when num_ranks is 2"):
        with_ranks_of_environment(small(tmp_path))
