"""A model size on the command line: a preset, or any other size by a name that spells it out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from choices import at_least

from cs336_systems.config import PRESETS, ModelConfig, preset
from cs336_systems.errors import bad, unknown

FIELDS = {"num_layers": "L", "num_heads": "H", "d_model": "D", "d_ff": "F", "vocab_size": "V"}
"""What a name spells out, and the letter before each number."""
_NAME = re.compile(" ".join(rf"{letter}(\d+)" for letter in FIELDS.values()))


def model_config(size: str, context: int) -> ModelConfig:
    """Return the model of a preset's name or of one like `L24 H16 D512 F4096 V10000`.

    Raises: UsageError for any other name, or sizes that do not fit one another.
    """
    found = _NAME.fullmatch(size)
    if found is None:
        return preset(size, context_length=context)
    fields = dict(zip(FIELDS, map(int, found.groups()), strict=True))
    return ModelConfig(**fields, context_length=context)


def size_name(config: ModelConfig) -> str:
    """Return the preset that a model is, or else the name that spells it out."""
    for name, known in PRESETS.items():
        if replace(known, context_length=config.context_length) == config:
            return name
    return " ".join(f"{letter}{getattr(config, field)}" for field, letter in FIELDS.items())


def override(option: str, text: str | None, default: ModelConfig) -> ModelConfig:
    """Return a model with the fields that `text` names, as in `d_model=512,num_layers=24`.

    Raises: UsageError for an unknown field, a value that is no number, or fields that do not fit.
    """
    fields: dict[str, int] = {}
    for word in _words(text):
        name, _, value = word.partition("=")
        if name not in FIELDS:
            raise unknown("benchmarks", option, [f"{field}=N" for field in FIELDS], word)
        fields[name] = at_least(f"{option} {name}", 1)(value)
    if text is not None and not fields:
        raise bad("benchmarks", option, "name at least one field", text)
    return replace(default, **fields)


def _words(text: str | None) -> Iterable[str]:
    return (word.strip() for word in (text or "").split(",") if word.strip())
