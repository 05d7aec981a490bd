"""What a training run is, from text to model: frozen sections, checked on creation.

A config is equal to itself after JSON (`to_dict`, `from_dict`), and every field can be set from the
command line as `--section.field`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from cs336_systems.attention import ATTENTION, DEFAULT_ATTENTION
from cs336_systems.config import ModelConfig, preset
from cs336_systems.errors import UsageError, bad, unknown
from cs336_systems.model import COMPILE_MODES
from cs336_systems.parallel import STRATEGIES, option_names
from cs336_systems.train.config_data import check_types, from_dict, read_config, to_dict
from cs336_systems.train.corpus import END_OF_TEXT, CorpusConfig

__all__ = [
    "CheckpointingConfig",
    "CorpusConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "ModelSection",
    "PipelineConfig",
    "TokenizerConfig",
    "TokensConfig",
    "TrainingConfig",
    "from_dict",
    "read_config",
    "to_dict",
]

PRECISIONS = ("fp32", "bf16")
OPTIMIZERS = ("adamw", "torch_adamw")
DEVICES = ("cpu", "cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What is asked of the tokenizer's training."""

    # Most ids it may have, special tokens included; a small corpus may yield fewer.
    vocab_size: int = 1024
    # Texts that are one id each; <|endoftext|> must be one of them.
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)

    def __post_init__(self) -> None:
        check_types("tokenizer", self)
        least = 256 + len(self.special_tokens)
        if self.vocab_size < least:
            rule = f"be at least {least} (every byte and {len(self.special_tokens)} special)"
            raise bad("tokenizer", "vocab_size", rule, self.vocab_size)
        if END_OF_TEXT not in self.special_tokens:
            raise bad("tokenizer", "special_tokens", f"include {END_OF_TEXT}", self.special_tokens)


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """How text becomes token files."""

    # Processes that encode; one encodes on the library's own threads.
    num_processes: int = 1

    def __post_init__(self) -> None:
        check_types("tokens", self)
        _at_least("tokens", self, 1, "num_processes")


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model's size; its vocabulary is always the tokenizer's."""

    # Name of the size that the fields below, where they are given, depart from.
    preset: str = "tiny"
    # Width of the residual stream.
    d_model: int | None = None
    # Width of the feed-forward layers.
    d_ff: int | None = None
    # Number of blocks.
    num_layers: int | None = None
    # Number of attention heads; divides d_model.
    num_heads: int | None = None
    # Tokens that the model sees at once.
    context_length: int | None = None
    # Base of the rotary embedding's wavelengths.
    rope_theta: float | None = None

    def __post_init__(self) -> None:
        check_types("model", self)
        self.config(vocab_size=256)

    def config(self, vocab_size: int) -> ModelConfig:
        """Return the model's hyperparameters for a tokenizer of so many ids.

        Raises: UsageError for an unknown preset or fields that do not fit one another.
        """
        overrides = {
            each.name: value
            for each in fields(self)
            if each.name != "preset" and (value := getattr(self, each.name)) is not None
        }
        return preset(self.preset, **overrides, vocab_size=vocab_size)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the model is trained, and on what."""

    # Optimizer steps of the whole run.
    num_steps: int = 500
    # Sequences in a step, of all ranks together.
    batch_size: int = 32
    # Sequences in one forward pass of a rank; gradients add up over as many passes as it takes.
    # null: all of the rank's at once.
    micro_batch_size: int | None = None
    # Learning rate at the end of the warm-up.
    max_learning_rate: float = 1e-3
    # Learning rate at the last step, where the cosine ends.
    min_learning_rate: float = 1e-4
    # Steps in which the learning rate rises from 0.
    warmup_steps: int = 50
    # Decoupled weight decay.
    weight_decay: float = 0.1
    # Decay rates of the optimizer's two moments.
    betas: tuple[float, float] = (0.9, 0.95)
    # What the optimizer adds to the denominator.
    eps: float = 1e-8
    # Gradients are scaled down to this norm; 0 or less: never.
    max_grad_norm: float = 1.0
    # fp32, or bf16 for autocast.
    precision: str = "fp32"
    # What torch.compile compiles: eager (nothing), blocks or model.
    compile: str = "eager"
    # A row of the attention table.
    attention_kernel: str = DEFAULT_ATTENTION
    # A row of the table of data-parallel strategies.
    ddp_wrapper: str = "none"
    # Options of that strategy, e.g. {"bucket_size_mb": 25}; dtypes as fp32, bf16 or fp16.
    ddp_options: dict[str, Any] = field(default_factory=dict)
    # Processes that train together, each on a device of its own.
    num_ranks: int = 1
    # cpu or cuda; null: a GPU when there is one.
    device: str | None = None
    # adamw (this project's) or torch_adamw (torch's, fused).
    optimizer: str = "adamw"
    # Of the weights, the batches and the samples.
    seed: int = 0

    def __post_init__(self) -> None:
        check_types("training", self)
        self._check_names()
        _at_least("training", self, 1, "num_steps", "batch_size", "num_ranks")
        _at_least("training", self, 0, "warmup_steps", "weight_decay", "eps", "seed")
        if self.seed >= 2**32:
            raise bad("training", "seed", "be below 2^32", self.seed)
        if not 0 <= self.min_learning_rate <= self.max_learning_rate:
            rule = f"be between 0 and max_learning_rate ({self.max_learning_rate})"
            raise bad("training", "min_learning_rate", rule, self.min_learning_rate)
        if self.warmup_steps > self.num_steps:
            rule = f"be at most num_steps ({self.num_steps})"
            raise bad("training", "warmup_steps", rule, self.warmup_steps)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise bad("training", "betas", "be in [0, 1)", list(self.betas))
        self._check_batches()
        self._check_strategy()

    def _check_names(self) -> None:
        for name, choices in {
            "precision": PRECISIONS,
            "compile": COMPILE_MODES,
            "attention_kernel": tuple(ATTENTION),
            "ddp_wrapper": tuple(STRATEGIES),
            "optimizer": OPTIMIZERS,
            "device": (None, *DEVICES),
        }.items():
            if getattr(self, name) not in choices:
                named = [str(choice) for choice in choices if choice is not None]
                raise unknown("training", name, named, getattr(self, name))

    def _check_batches(self) -> None:
        if self.batch_size % self.num_ranks:
            rule = f"be a multiple of num_ranks ({self.num_ranks})"
            raise bad("training", "batch_size", rule, self.batch_size)
        of_a_rank = self.batch_size // self.num_ranks
        micro = self.micro_batch_size
        if micro is not None and (micro < 1 or of_a_rank % micro):
            raise bad("training", "micro_batch_size", f"divide a rank's {of_a_rank}", micro)

    def _check_strategy(self) -> None:
        if self.ddp_wrapper == "none" and self.num_ranks > 1:
            raise UsageError(
                f"training: ddp_wrapper must communicate when num_ranks is {self.num_ranks}, "
                "got 'none', with which each rank would train alone"
            )
        if not self.ddp_options and self.compile != "model":
            return  # and nothing is imported that nobody has asked for
        strategy: Any = STRATEGIES[self.ddp_wrapper].load()
        if self.compile == "model" and not strategy.compiles_whole:
            rule = f"be eager or blocks with {self.ddp_wrapper}, which works between layers"
            raise bad("training", "compile", rule, self.compile)
        # The group is the program's to make.
        known = [name for name in option_names(strategy) if name != "group"]
        for name, value in self.ddp_options.items():
            if name not in known:
                raise unknown("training", f"ddp_options of {self.ddp_wrapper}", known, name)
            if name.endswith("dtype") and value is not None and value not in list(DTYPES):
                raise unknown("training", f"ddp_options {name}", DTYPES, value)

    @property
    def rank_batch_size(self) -> int:
        """Sequences of one rank in a step."""
        return self.batch_size // self.num_ranks

    @property
    def num_micro_batches(self) -> int:
        """Forward passes of one rank in a step."""
        return self.rank_batch_size // (self.micro_batch_size or self.rank_batch_size)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the model is judged while it is trained."""

    # Steps between evaluations; 0 or less: only at the end.
    interval: int = 100
    # Batches of batch_size validation windows, the same ones every time.
    num_batches: int = 8
    # What samples begin with.
    sample_prompt: str = "Once upon a time"
    # Tokens of the sample at the end; evaluations before it show a quarter.
    sample_tokens: int = 128
    # Of sampling; 0: always the likeliest token.
    temperature: float = 0.8
    # Only so many of the likeliest tokens are drawn from; null: all.
    top_k: int | None = 50

    def __post_init__(self) -> None:
        check_types("evaluation", self)
        _at_least("evaluation", self, 1, "num_batches")
        _at_least("evaluation", self, 0, "sample_tokens", "temperature")
        if self.top_k is not None:
            _at_least("evaluation", self, 1, "top_k")


@dataclass(frozen=True, kw_only=True)
class CheckpointingConfig:
    """When training is saved."""

    # Steps between checkpoints; 0 or less: only at the end, which is always saved.
    checkpointing_interval: int = 0
    # How many of the newest are kept.
    keep: int = 2
    # Go on from the newest good checkpoint in the output folder, if there is one.
    resume: bool = True

    def __post_init__(self) -> None:
        check_types("checkpointing", self)
        _at_least("checkpointing", self, 1, "keep")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where the course of training can be followed; log.jsonl is always written."""

    # Steps between lines of the log; losses stay on the device in between.
    interval: int = 10
    # Write for TensorBoard too.
    tensorboard: bool = False
    # Send to Weights & Biases too; its WANDB_MODE=offline is respected.
    wandb: bool = False
    # The project there.
    wandb_project: str = "cs336-systems"
    # Show a progress bar.
    progress: bool = True

    def __post_init__(self) -> None:
        check_types("logging", self)
        _at_least("logging", self, 1, "interval")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """One run, from text to model."""

    # What the run is called where runs are listed.
    name: str = "run"
    # Where all of its files go.
    output_dir: str = "artifacts/run"
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    model: ModelSection = field(default_factory=ModelSection)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        check_types("config", self)
        for name in ("name", "output_dir"):
            if not getattr(self, name):
                raise bad("config", name, "be some text", "")


def _at_least(where: str, section: object, least: int, *names: str) -> None:
    for name in names:
        if getattr(section, name) < least:
            raise bad(where, name, f"be at least {least}", getattr(section, name))
