"""Model sizes as data."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from cs336_systems.errors import bad, unknown


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model's hyperparameters, checked on creation.

    Raises: UsageError naming the field that breaks a rule.
    """

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    vocab_size: int = 10_000
    context_length: int = 1024
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "rope_theta" and (
                not isinstance(value, int) or isinstance(value, bool)
            ):
                raise bad("model config", field.name, "be an integer", value)
            if value <= 0:
                raise bad("model config", field.name, "be positive", value)
        if self.d_model % self.num_heads:
            raise bad(
                "model config", "num_heads", f"divide d_model ({self.d_model})", self.num_heads
            )
        if self.d_head % 2:
            raise bad("model config", "d_model / num_heads", "be even (rotary pairs)", self.d_head)

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads


PRESETS: dict[str, ModelConfig] = {
    # A step takes milliseconds on two CPU cores: for the default run, the tests and the gate.
    "debug": ModelConfig(d_model=32, d_ff=64, num_layers=1, num_heads=2, vocab_size=128),
    "tiny": ModelConfig(d_model=128, d_ff=512, num_layers=2, num_heads=4, vocab_size=1024),
    "small": ModelConfig(d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "medium": ModelConfig(d_model=1024, d_ff=4096, num_layers=24, num_heads=16),
    "large": ModelConfig(d_model=1280, d_ff=5120, num_layers=36, num_heads=20),
    "xl": ModelConfig(d_model=1600, d_ff=6400, num_layers=48, num_heads=25),
    "2.7b": ModelConfig(d_model=2560, d_ff=10240, num_layers=32, num_heads=32),
    "8b": ModelConfig(
        d_model=4096,
        d_ff=11008,
        num_layers=34,
        num_heads=32,
        vocab_size=151_936,
        context_length=32_768,
    ),
}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """Return a preset, with fields replaced.

    Raises: UsageError for an unknown preset or a value that breaks a rule.
    """
    if name not in PRESETS:
        raise unknown("model config", "preset", PRESETS, name)
    return replace(PRESETS[name], **overrides)
