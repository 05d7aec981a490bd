"""Does every field of a config have an option that sets it, and nothing else?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cs336_systems.attention import ATTENTION
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
    to_dict,
)
from cs336_systems.train.overrides import OneLineParser, add_options, overridden


def parser() -> argparse.ArgumentParser:
    made = OneLineParser(prog="test")
    add_options(made, PipelineConfig)
    return made


PARSER = parser()


def parse(*arguments: str, config: PipelineConfig | None = None) -> PipelineConfig:
    return overridden(config or PipelineConfig(), PARSER.parse_args(arguments))


def as_options(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Spell out a whole config as a user would."""
    for name, value in data.items():
        if isinstance(value, dict) and name != "ddp_options":
            yield from as_options(value, f"{name}.")
        elif isinstance(value, bool):
            yield f"--{'' if value else 'no-'}{prefix}{name}"
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            yield f"--{prefix}{name}={text}"


def positive(most: float = 1e9) -> st.SearchStrategy[float]:
    return st.floats(1e-9, most)


COUNT = st.integers(1, 10_000)
TRAININGS = st.builds(
    TrainingConfig,
    num_steps=st.integers(100, 10_000),
    batch_size=st.sampled_from([8, 16, 48]),
    micro_batch_size=st.sampled_from([None, 1, 2, 4]),
    max_learning_rate=st.floats(1e-3, 1),
    min_learning_rate=st.floats(0, 1e-3),
    warmup_steps=st.integers(0, 100),
    weight_decay=st.one_of(st.just(0), positive()),
    betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    max_grad_norm=st.floats(-1e9, 1e9),
    precision=st.sampled_from(["fp32", "bf16"]),
    attention_kernel=st.sampled_from(list(ATTENTION)),
    ddp_wrapper=st.just("flashddp"),
    ddp_options=st.dictionaries(st.just("bucket_size_mb"), positive()),
    num_ranks=st.integers(1, 2),
    device=st.sampled_from([None, "cpu", "cuda"]),
    seed=COUNT,
)
CONFIGS = st.builds(
    PipelineConfig,
    name=st.text(min_size=1),
    output_dir=st.text(min_size=1),
    corpus=st.builds(
        CorpusConfig,
        source=st.sampled_from(["builtin", "tinystories", "file:a b.txt", "file:--x"]),
        megabytes=positive(),
        seed=st.integers(),
        separator=st.text(min_size=1),
        validation_period=st.integers(2),
    ),
    tokenizer=st.builds(
        TokenizerConfig,
        vocab_size=st.integers(300, 10**6),
        special_tokens=st.sampled_from([("<|endoftext|>",), ("<|a|>", "<|endoftext|>")]),
    ),
    tokens=st.builds(TokensConfig, num_processes=COUNT),
    model=st.builds(
        ModelSection,
        preset=st.sampled_from(["tiny", "debug"]),
        d_ff=st.none() | COUNT,
        rope_theta=st.none() | positive(),
    ),
    training=TRAININGS,
    evaluation=st.builds(
        EvaluationConfig,
        interval=st.integers(-5, 5),
        sample_prompt=st.text(),
        top_k=st.none() | COUNT,
    ),
    checkpointing=st.builds(
        CheckpointingConfig, checkpointing_interval=st.integers(), resume=st.booleans()
    ),
    logging=st.builds(LoggingConfig, tensorboard=st.booleans(), wandb_project=st.text()),
)


@given(config=CONFIGS)
@example(config=PipelineConfig(name="--help", output_dir="null"))
@example(config=PipelineConfig(evaluation=EvaluationConfig(sample_prompt="", top_k=None)))
def test_any_config_can_be_spelled_out_as_options(config: PipelineConfig) -> None:
    assert parse(*as_options(to_dict(config))) == config


@given(config=CONFIGS)
def test_no_option_changes_nothing(config: PipelineConfig) -> None:
    assert parse(config=config) == config


def test_one_option_changes_one_field() -> None:
    config = PipelineConfig(name="mine", training=TrainingConfig(num_steps=70))
    found = to_dict(parse("--training.seed", "3", config=config))
    assert found.pop("training") == to_dict(TrainingConfig(num_steps=70, seed=3))
    expected = to_dict(config)
    del expected["training"]
    assert found == expected


@pytest.mark.parametrize(
    ("arguments", "section", "field", "value"),
    [
        (["--training.num_steps", "100"], "training", "num_steps", 100),
        (["--training.max_learning_rate", "1e-2"], "training", "max_learning_rate", 0.01),
        (["--training.max_grad_norm", "-1"], "training", "max_grad_norm", -1.0),
        (["--training.betas", "0.5,0.6"], "training", "betas", (0.5, 0.6)),
        (["--training.betas", "[0.5, 0.6]"], "training", "betas", (0.5, 0.6)),
        (["--evaluation.top_k", "null"], "evaluation", "top_k", None),
        (["--no-checkpointing.resume"], "checkpointing", "resume", False),
        (["--no-checkpointing.resume", "--checkpointing.resume"], "checkpointing", "resume", True),
        (["--checkpointing_interval", "-1"], "checkpointing", "checkpointing_interval", -1),
        (["--attention_kernel", "vectorized_torch"], "training", "attention_kernel", None),
        (["--ddp_wrapper", "flashddp"], "training", "ddp_wrapper", None),
        (
            ["--tokenizer.special_tokens", "<|endoftext|>,<|pad|>"],
            "tokenizer",
            "special_tokens",
            ("<|endoftext|>", "<|pad|>"),
        ),
    ],
)
def test_values_as_they_are_typed(
    arguments: list[str], section: str, field: str, value: object
) -> None:
    expected = arguments[-1] if field in ("attention_kernel", "ddp_wrapper") else value
    found = getattr(getattr(parse(*arguments), section), field)
    assert (found, type(found)) == (expected, type(expected))


def test_options_of_a_strategy() -> None:
    options = '{"bucket_size_mb": 25}'
    found = parse("--ddp_wrapper", "flashddp", "--training.ddp_options", options)
    assert found.training.ddp_options == {"bucket_size_mb": 25}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.num_steps", "x"], "training: num_steps must be an integer, got 'x'"),
        (["--training.num_steps", "1.5"], "training: num_steps must be an integer, got '1.5'"),
        (["--training.num_steps", "null"], "training: num_steps must be an integer, got 'null'"),
        (["--training.num_steps", "0"], "training: num_steps must be at least 1, got 0"),
        (["--training.eps", "nan"], "training: eps must be a finite number, got nan"),
        (["--training.betas", "0.9"], "training: betas must be a list of 2: finite number,"),
        (["--training.betas", "0.9,x"], "training: betas must be a list of 2: finite number,"),
        (["--training.ddp_options", "{"], "training: ddp_options must be a mapping of options,"),
        (["--training.ddp_options", "[1]"], "training: ddp_options must be a mapping of options,"),
        (["--evaluation.top_k", "many"], "evaluation: top_k must be an integer or null, got"),
        (["--corpus.megabytes", "big"], "corpus: megabytes must be a finite number, got 'big'"),
        (["--attention_kernel", "magic"], "training: attention_kernel must be one of "),
        (["--training.num_step", "3"], "test: unrecognized arguments: --training.num_step 3 ("),
        (["--training.num_steps"], "test: argument --training.num_steps: expected one argument"),
        (["stray"], "test: unrecognized arguments: stray ("),
        (["--checkpointing.resume=yes"], "test: argument --checkpointing.resume/--no-checkpoin"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_help_explains_every_field_in_its_section() -> None:
    groups = {
        group.title: [action for action in group._group_actions if action.help]
        for group in PARSER._action_groups
    }
    sections = [
        name for name, value in to_dict(PipelineConfig()).items() if isinstance(value, dict)
    ]
    assert list(groups)[-len(sections) :] == sections
    for name in sections:
        actions = {action.dest.split(".")[1]: action.help for action in groups[name]}
        assert list(actions) == list(to_dict(PipelineConfig())[name])
        for text in actions.values():
            # A sentence, and the default behind it.
            assert text is not None
            assert text.split(" [")[0].endswith(".")
            assert text.endswith("]")
    shown = " ".join(PARSER.format_help().split())
    assert "--training.num_steps N Optimizer steps of the whole run. [500]" in shown
