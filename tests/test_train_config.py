"""Is a config equal to itself after JSON, and is whatever does not fit one clear line?"""

from __future__ import annotations

import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cs336_systems.config import PRESETS
from cs336_systems.errors import UsageError
from cs336_systems.train.config import (
    CheckpointingConfig,
    CorpusConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelSection,
    PipelineConfig,
    TokenizerConfig,
    TokensConfig,
    TrainingConfig,
    from_dict,
    read_config,
    to_dict,
)
from cs336_systems.train.config_data import comments_of

SECTIONS = [field.name for field in fields(PipelineConfig)][2:]


def through_json(config: PipelineConfig) -> PipelineConfig:
    return from_dict(PipelineConfig, json.loads(json.dumps(to_dict(config))))


def test_defaults_survive_json() -> None:
    config = PipelineConfig()
    assert through_json(config) == config
    assert from_dict(PipelineConfig, {}) == config
    assert to_dict(config)["training"]["betas"] == [0.9, 0.95]


@given(
    training=st.builds(
        TrainingConfig,
        num_steps=st.integers(50, 10**6),
        batch_size=st.integers(1, 8).map(lambda n: 24 * n),
        micro_batch_size=st.sampled_from([None, 1, 2, 3]),
        num_ranks=st.sampled_from([1, 2, 4]),
        betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
        max_grad_norm=st.floats(-1, 1e9),
        ddp_wrapper=st.just("flashddp"),
        ddp_options=st.sampled_from([{}, {"bucket_size_mb": 1}, {"bucket_size_mb": None}]),
        device=st.sampled_from([None, "cpu", "cuda"]),
    ),
    model=st.builds(
        ModelSection,
        preset=st.sampled_from(sorted(PRESETS)),
        context_length=st.none() | st.integers(1, 9999),
    ),
    evaluation=st.builds(EvaluationConfig, sample_prompt=st.text(), top_k=st.none()),
    checkpointing=st.builds(CheckpointingConfig, resume=st.booleans(), keep=st.integers(1, 9)),
    logging=st.builds(LoggingConfig, wandb=st.booleans()),
    corpus=st.builds(CorpusConfig, megabytes=st.floats(1e-3, 1e3)),
    tokenizer=st.just(TokenizerConfig(special_tokens=("<|pad|>", "<|endoftext|>"))),
    tokens=st.builds(TokensConfig, num_processes=st.integers(1, 64)),
)
def test_any_config_survives_json(**sections: Any) -> None:
    config = PipelineConfig(**sections)
    assert through_json(config) == config


BAD: list[tuple[dict[str, Any], str]] = [
    ({"trainng": {}}, "config: field must be one of name, output_dir, corpus, "),
    ({"training": []}, "training: section must be a mapping of fields, got []"),
    ({"name": 3}, "config: name must be text, got 3"),
    ({"output_dir": ""}, "config: output_dir must be some text, got ''"),
    ({"training": {"lr": 1}}, "training: field must be one of num_steps, batch_size, "),
    ({"training": {"num_steps": "9"}}, "training: num_steps must be an integer, got '9'"),
    ({"training": {"num_steps": True}}, "training: num_steps must be an integer, got True"),
    ({"training": {"num_steps": 0}}, "training: num_steps must be at least 1, got 0"),
    ({"training": {"batch_size": -2}}, "training: batch_size must be at least 1, got -2"),
    ({"training": {"micro_batch_size": 5}}, "training: micro_batch_size must divide a rank's 32,"),
    ({"training": {"eps": float("nan")}}, "training: eps must be a finite number, got nan"),
    ({"training": {"weight_decay": -1}}, "training: weight_decay must be at least 0, got -1"),
    ({"training": {"betas": [0.9]}}, "training: betas must be a list of 2: finite number, got"),
    ({"training": {"betas": [0.9, 1]}}, "training: betas must be in [0, 1), got [0.9, 1]"),
    ({"training": {"min_learning_rate": 1}}, "training: min_learning_rate must be between 0 and"),
    ({"training": {"num_steps": 9}}, "training: warmup_steps must be at most num_steps (9), got"),
    ({"training": {"precision": "fp8"}}, "training: precision must be one of fp32, bf16, got"),
    ({"training": {"compile": "all"}}, "training: compile must be one of eager, blocks, model,"),
    ({"training": {"device": "tpu"}}, "training: device must be one of cpu, cuda, got 'tpu'"),
    ({"training": {"optimizer": "sgd"}}, "training: optimizer must be one of adamw, torch_adamw,"),
    ({"training": {"attention_kernel": "x"}}, "training: attention_kernel must be one of scaled_"),
    ({"training": {"ddp_wrapper": "x"}}, "training: ddp_wrapper must be one of none, naive, flat"),
    (
        {"training": {"num_ranks": 2}},
        "training: ddp_wrapper must communicate when num_ranks is 2, got 'none', with which each",
    ),
    (
        {"training": {"num_ranks": 5, "ddp_wrapper": "flat"}},
        "training: batch_size must be a multiple of num_ranks (5), got 32",
    ),
    (
        {"training": {"ddp_wrapper": "flashddp", "ddp_options": {"bucket": 1}}},
        "training: ddp_options of flashddp must be one of bucket_size_mb, ",
    ),
    (
        {"training": {"ddp_wrapper": "fsdp", "ddp_options": {"compute_dtype": "int"}}},
        "training: ddp_options compute_dtype must be one of fp32, bf16, fp16, got 'int'",
    ),
    (
        {"training": {"ddp_wrapper": "fsdp", "compile": "model"}},
        "training: compile must be eager or blocks with fsdp, which works between layers, got",
    ),
    ({"training": {"seed": 2**32}}, "training: seed must be below 2^32, got 4294967296"),
    ({"training": {"ddp_options": [1]}}, "training: ddp_options must be a mapping of options, got"),
    ({"model": {"preset": "huge"}}, "model config: preset must be one of debug, tiny, "),
    ({"model": {"num_heads": 3}}, "model config: num_heads must divide d_model (128), got 3"),
    ({"model": {"context_length": "1"}}, "model: context_length must be an integer or null, got"),
    ({"tokenizer": {"vocab_size": 256}}, "tokenizer: vocab_size must be at least 257 (every byte"),
    ({"tokenizer": {"special_tokens": "a"}}, "tokenizer: special_tokens must be a list of text,"),
    ({"tokenizer": {"special_tokens": []}}, "tokenizer: special_tokens must include <|endoftext"),
    ({"tokens": {"num_processes": 0}}, "tokens: num_processes must be at least 1, got 0"),
    ({"corpus": {"megabytes": "4"}}, "corpus: megabytes must be a finite number, got '4'"),
    ({"corpus": {"source": "web"}}, "corpus: source must be builtin, tinystories or file:PATH,"),
    ({"evaluation": {"num_batches": 0}}, "evaluation: num_batches must be at least 1, got 0"),
    ({"evaluation": {"temperature": -1}}, "evaluation: temperature must be at least 0, got -1"),
    ({"evaluation": {"top_k": 0}}, "evaluation: top_k must be at least 1, got 0"),
    ({"checkpointing": {"keep": 0}}, "checkpointing: keep must be at least 1, got 0"),
    ({"checkpointing": {"resume": 1}}, "checkpointing: resume must be true or false, got 1"),
    ({"logging": {"interval": 0}}, "logging: interval must be at least 1, got 0"),
]


@pytest.mark.parametrize(("data", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_does_not_fit_is_one_line(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}") as caught:
        from_dict(PipelineConfig, data)
    assert "\n" not in str(caught.value)


def test_sections_made_by_hand_are_checked_too() -> None:
    with pytest.raises(UsageError, match=r"^training: num_steps must be an integer, got 1\.5$"):
        TrainingConfig(num_steps=1.5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^config: model must be a ModelSection, got 'tiny'$"):
        PipelineConfig(model="tiny")  # type: ignore[arg-type]


@given(section=st.sampled_from(SECTIONS), value=st.none() | st.integers() | st.text())
def test_a_section_that_is_no_mapping_is_one_line(section: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"^{section}: section must be a mapping of fields, got"):
        from_dict(PipelineConfig, {section: value})


def test_the_vocabulary_is_the_tokenizers() -> None:
    config = ModelSection(preset="tiny", context_length=64).config(vocab_size=777)
    assert (config.vocab_size, config.context_length, config.d_model) == (777, 64, 128)


def test_batches_of_ranks() -> None:
    training = TrainingConfig(
        batch_size=24, micro_batch_size=3, num_ranks=2, ddp_wrapper="overlapped"
    )
    assert (training.rank_batch_size, training.num_micro_batches) == (12, 4)
    assert TrainingConfig().num_micro_batches == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config: {path}: No such file or directory"),
        ("{", "config: {path} must be JSON: Expecting property name"),
        ("[]", "config: section must be a mapping of fields, got []"),
        ('{"training": {"seed": -1}}', "training: seed must be at least 0, got -1"),
    ],
)
def test_files(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=f"^{re.escape(message.format(path=path))}"):
        read_config(PipelineConfig, path)


def test_a_file_that_is_right(tmp_path: Path) -> None:
    config = PipelineConfig(training=TrainingConfig(seed=3))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert read_config(PipelineConfig, tmp_path / "config.json") == config


def test_every_field_of_every_section_is_explained() -> None:
    config = PipelineConfig()
    explained = 0
    for name in SECTIONS:
        section = getattr(config, name)
        assert is_dataclass(section)
        comments = comments_of(type(section))
        assert set(comments) == {field.name for field in fields(section)}
        explained += len(comments)
    assert explained > 40
