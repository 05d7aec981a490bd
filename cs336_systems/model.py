"""The language model of `cs336_basics` on any row of the attention table."""

from __future__ import annotations

from dataclasses import asdict

import torch
from cs336_basics.model import BasicsTransformerLM, TransformerBlock

from cs336_systems.attention import ATTENTION, DEFAULT_ATTENTION
from cs336_systems.config import ModelConfig
from cs336_systems.errors import unknown

COMPILE_MODES = ("eager", "blocks", "model")


def build_model(
    config: ModelConfig,
    *,
    attention: str = DEFAULT_ATTENTION,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> BasicsTransformerLM:
    """Build the model with every layer's attention computed by the table's row `attention`.

    Weights are initialised on `device` itself, so a large model never passes through host memory.
    Raises: UsageError for an unknown row; ImportError when the row's package is missing.
    """
    function = ATTENTION[attention].load()
    model = BasicsTransformerLM(**asdict(config), device=device, dtype=dtype)
    for layer in model.layers:
        assert isinstance(layer, TransformerBlock)
        layer.attn.attention_fn = function
    return model


def compile_model(model: BasicsTransformerLM, mode: str) -> BasicsTransformerLM:
    """Compile `model` in place and return it: not at all, each block by itself, or as one graph.

    Blocks share one compiled graph, so `blocks` compiles in seconds whatever the depth.
    Raises: UsageError for an unknown mode.
    """
    if mode not in COMPILE_MODES:
        raise unknown("compile_model", "mode", COMPILE_MODES, mode)
    if mode == "blocks":
        for layer in model.layers:
            layer.compile(fullgraph=True, dynamic=False)
    if mode == "model":
        model.compile(fullgraph=True, dynamic=False)
    return model
