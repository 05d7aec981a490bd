"""Closed forms: parameters, floating-point operations, memory of the model, without building it."""

from __future__ import annotations

from typing import NamedTuple

from cs336_systems.config import ModelConfig
from cs336_systems.errors import unknown

PASSES = ("forward", "forward_backward", "full_step", "backward", "optimizer")
FP32_BYTES = 4


class Parameters(NamedTuple):
    """Numbers of weights by where they are."""

    embedding: int
    blocks: int
    head: int
    norms: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)

    @property
    def in_products(self) -> int:
        """Those that each token is multiplied with; looking up an embedding multiplies nothing."""
        return self.blocks + self.head


def parameters(config: ModelConfig) -> Parameters:
    """Count the model's weights."""
    attention = 4 * config.d_model**2
    feed_forward = 3 * config.d_model * config.d_ff
    return Parameters(
        embedding=config.vocab_size * config.d_model,
        blocks=config.num_layers * (attention + feed_forward),
        head=config.vocab_size * config.d_model,
        norms=(2 * config.num_layers + 1) * config.d_model,
    )


def forward_flops(config: ModelConfig, batch_size: int, context: int) -> float:
    """Return the model FLOPs of one forward pass: every product, attention at its causal half.

    Source: Chowdhery et al. 2022, appendix B, with the masked half of the scores left out.
    """
    tokens = batch_size * context
    products = 2.0 * parameters(config).in_products * tokens
    attention = 2.0 * batch_size * context**2 * config.d_model * config.num_layers
    return products + attention


def pass_flops(config: ModelConfig, batch_size: int, context: int, which: str) -> float | None:
    """Return the model FLOPs of one pass; backward is twice forward.

    The optimizer multiplies no matrices.

    Raises: UsageError for an unknown pass.
    """
    if which not in PASSES:
        raise unknown("accounting", "pass", PASSES, which)
    forward = forward_flops(config, batch_size, context)
    factor = {"forward": 1, "backward": 2, "forward_backward": 3, "full_step": 3}
    return factor[which] * forward if which in factor else None


def least_bytes(
    config: ModelConfig,
    batch_size: int,
    context: int,
    which: str,
    *,
    half: bool,
    scores_kept: int,
) -> int:
    """Return memory a pass cannot do without: a lower bound, so that nothing that fits is refused.

    fp32 weights; with gradients, as many bytes again; with AdamW, twice as many; for backward, each
    block's input and `scores_kept` matrices of attention scores (0 for fused attention). Autocast
    halves these.
    """
    weights = FP32_BYTES * parameters(config).total
    states = {"forward": 1, "forward_backward": 2, "backward": 2, "full_step": 4, "optimizer": 4}[
        which
    ]
    if which == "optimizer":
        return states * weights
    element = 2 if half else FP32_BYTES
    scores = scores_kept * batch_size * config.num_heads * context**2 * element
    if which == "forward":
        return states * weights + scores
    residual = batch_size * context * config.d_model * element
    return states * weights + config.num_layers * (residual + scores)


def attention_flops(
    batch_size: int,
    num_heads: int,
    seq: int,
    head_dim: int,
    which: str,
    *,
    is_causal: bool,
    num_keys: int | None = None,
) -> float:
    """Return the FLOPs that attention kernels are compared by: two products forward, five backward.

    `num_keys` is how many keys the `seq` queries look at, as many as there are queries when None.
    Source: Dao 2023 (FlashAttention-2), section 4.1: the causal mask halves the count, backward is
    2.5 forward.
    """
    keys = seq if num_keys is None else num_keys
    pairs = _causal_pairs(seq, keys) if is_causal else float(seq * keys)
    forward = 4.0 * batch_size * num_heads * pairs * head_dim
    return forward * {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}[which]


def _causal_pairs(queries: int, keys: int) -> float:
    """Return how many scores a mask aligned at the top left leaves, its diagonal counted half."""
    below = max(0, queries - keys)
    return min(queries, keys) ** 2 / 2 + below * keys


def attention_bytes(
    batch_size: int,
    num_heads: int,
    seq: int,
    head_dim: int,
    which: str,
    *,
    element_bytes: int,
    num_keys: int | None = None,
) -> int:
    """Return the least bytes that attention moves: each input and result once, nothing between.

    Forward reads q, k, v and writes o; with a backward pass there are o, do, dq, dk, dv as well,
    whether or not the forward pass is part of it. The log-sum-exp, one number a row, is left out.
    """
    # As many tensors are of the queries' length as of the keys'.
    num_tensors = {"forward": 2, "backward": 4, "forward_backward": 4}[which]
    rows = seq + (seq if num_keys is None else num_keys)
    return num_tensors * batch_size * num_heads * rows * head_dim * element_bytes
