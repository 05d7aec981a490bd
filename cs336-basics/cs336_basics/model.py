"""A decoder-only Transformer language model: pre-norm blocks, RoPE, SwiGLU, untied output layer.

The names below are looked up when they are used, so a replacement assigned to this module, such as
an annotated `scaled_dot_product_attention`, takes effect in every model.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from cs336_basics.layers import Device, Embedding, Linear, RMSNorm, RotaryEmbedding, SwiGLU
from cs336_basics.nn_utils import checked_ids, softmax
from cs336_basics.sampling import check_sampling, sample_next

__all__ = [
    "BasicsTransformerLM",
    "CausalMultiHeadSelfAttention",
    "Embedding",
    "Linear",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
    "TransformerBlock",
    "scaled_dot_product_attention",
]


def scaled_dot_product_attention(
    Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Softmax of the scaled scores, times V; a query that may see no key gets zeros.

    Shapes: Q (..., queries, d), K (..., keys, d), V (..., keys, d_v), boolean mask broadcast to
        (..., queries, keys) with False = masked, result (..., queries, d_v).
    Cost: O(queries x keys) memory, several times over.
    Source: Vaswani et al., "Attention Is All You Need", eq. 1.
    """
    scores = (Q / math.sqrt(Q.shape[-1])) @ K.transpose(-2, -1)  # (..., queries, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return softmax(scores, dim=-1) @ V


class CausalMultiHeadSelfAttention(nn.Module):
    """Self-attention in which a position sees itself and what came before.

    Set `attention_fn` to run a kernel in place of `scaled_dot_product_attention`; it is called as
    `attention_fn(q, k, v, is_causal=True)`. Each operand may be a strided view.
    Shapes: x (..., seq, d_model), token_positions (..., seq), result (..., seq, d_model);
        attention_fn (batch, heads, seq, d_head) in and out.
    Raises: ValueError when the heads do not divide d_model.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        positional_encoder: RotaryEmbedding | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.d_head = num_heads, _head_dim(d_model, num_heads)
        self.q_proj = Linear(d_model, d_model, device, dtype)
        self.k_proj = Linear(d_model, d_model, device, dtype)
        self.v_proj = Linear(d_model, d_model, device, dtype)
        self.output_proj = Linear(d_model, d_model, device, dtype)
        self.positional_encoder = positional_encoder
        self.attention_fn: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor, token_positions: Tensor | None = None) -> Tensor:
        q, k, v = (self._split_heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.positional_encoder is not None:
            # One row of positions serves all heads.
            positions = None if token_positions is None else token_positions.unsqueeze(-2)
            q = self.positional_encoder(q, positions).to(v.dtype)
            k = self.positional_encoder(k, positions).to(v.dtype)
        attended = self._attend(q, k, v)  # (..., heads, seq, d_head)
        return self.output_proj(attended.transpose(-3, -2).flatten(-2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.d_head)).transpose(-3, -2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.attention_fn is not None:
            batched = (q.shape[:-3].numel(), *q.shape[-3:])
            operands = (t.reshape(batched) for t in (q, k, v))  # a view for (batch, seq, d_model)
            return self.attention_fn(*operands, is_causal=True).reshape(q.shape)
        position = torch.arange(q.shape[-2], device=q.device)
        visible = position.unsqueeze(-1) >= position  # (query, key)
        return scaled_dot_product_attention(Q=q, K=k, V=v, mask=visible)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each on a normalised input and added to the residual stream.

    Shapes: x (..., seq, d_model), token_positions (..., seq), result (..., seq, d_model).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        positional_encoder: RotaryEmbedding | None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attn = CausalMultiHeadSelfAttention(
            d_model, num_heads, positional_encoder, device, dtype
        )
        self.ffn = SwiGLU(d_model, d_ff, device, dtype)
        self.ln1 = RMSNorm(d_model, device=device, dtype=dtype)
        self.ln2 = RMSNorm(d_model, device=device, dtype=dtype)

    def forward(self, x: Tensor, token_positions: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln1(x), token_positions)
        return x + self.ffn(self.ln2(x))


class BasicsTransformerLM(nn.Module):
    """Token ids in, next-token logits out.

    `config` holds the arguments that make an equal model, ready for JSON.
    Shapes: token_ids (..., seq) integers, result (..., seq, vocab).
    Raises: ValueError for a sequence longer than the context, for ids that are not integers and,
        on the CPU, for ids outside the vocabulary.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ff: int,
        rope_theta: float = 10000.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config: dict[str, int | float] = {
            "vocab_size": vocab_size,
            "context_length": context_length,
            "d_model": d_model,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "d_ff": d_ff,
            "rope_theta": rope_theta,
        }
        self.vocab_size, self.context_length = vocab_size, context_length
        d_head = _head_dim(d_model, num_heads)
        rope = RotaryEmbedding(context_length, d_head, rope_theta, device)  # one table for all
        self.token_embeddings = Embedding(vocab_size, d_model, device, dtype)
        self.layers = nn.ModuleList(
            TransformerBlock(d_model, num_heads, d_ff, rope, device, dtype)
            for _ in range(num_layers)
        )
        self.ln_final = RMSNorm(d_model, device=device, dtype=dtype)
        self.lm_head = Linear(d_model, vocab_size, device, dtype)

    def forward(self, token_ids: Tensor) -> Tensor:
        if token_ids.ndim == 0 or token_ids.shape[-1] > self.context_length:
            raise ValueError(
                "BasicsTransformerLM: token_ids must be (..., seq) with seq at most context_length "
                f"{self.context_length}, got {tuple(token_ids.shape)}"
            )
        x = self.token_embeddings(token_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.ln_final(x))

    def reset_parameters(self) -> None:
        """Initialise every layer anew: what a model made on the meta device needs."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, by default without the token embeddings, which cost no FLOPs."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.token_embeddings.weight.numel() if non_embedding else total

    @torch.no_grad()
    def generate(
        self,
        x: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        eos_token_id: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue the prompt `x` token by token and return the new tokens only.

        Sampling sees the last context_length tokens. It ends early once every row has produced
        `eos_token_id`; a row that ended before the others is filled up with it.
        Shapes: x (seq,) or (batch, seq), result (batch, new) int64, batch 1 for (seq,).
        Raises: ValueError for an empty prompt, a negative count or temperature, or top_k below 1.
        """
        check_sampling(temperature, top_k)
        if max_new_tokens < 0:
            raise ValueError(f"generate: max_new_tokens must be >= 0, got {max_new_tokens!r}")
        prompt = self._check_prompt(x)
        batch, end = prompt.shape
        tokens = prompt.new_zeros(batch, end + max_new_tokens, dtype=torch.int64)
        tokens[:, :end] = prompt
        ended = torch.zeros(batch, dtype=torch.bool, device=x.device)
        with _evaluating(self):
            for now in range(end, end + max_new_tokens):
                logits = self(tokens[:, max(0, now - self.context_length) : now])[:, -1]
                drawn = sample_next(logits, temperature, top_k, generator)
                if eos_token_id is not None:
                    drawn = drawn.masked_fill(ended, eos_token_id)
                    ended |= drawn == eos_token_id
                tokens[:, now] = drawn
                if eos_token_id is not None and bool(ended.all()):
                    return tokens[:, end : now + 1]
        return tokens[:, end:]

    def _check_prompt(self, x: Tensor) -> Tensor:
        if x.ndim not in (1, 2) or x.numel() == 0:
            raise ValueError(
                f"generate: x must be a non-empty (seq,) or (batch, seq), got {tuple(x.shape)}"
            )
        return checked_ids("generate", "x", x, self.vocab_size).reshape(-1, x.shape[-1])

    @classmethod
    def from_pretrained(cls, path: str | Path, device: Device = None) -> Self:
        """Load the model that `model_config.json` and `model.pt` in the folder `path` describe.

        Raises: FileNotFoundError for a missing file, ValueError for a config of another model.
        """
        config_path, weights_path = Path(path) / "model_config.json", Path(path) / "model.pt"
        for file in (config_path, weights_path):
            if not file.is_file():
                raise FileNotFoundError(f"from_pretrained: {file.name} must be in {path}")
        model = cls(**_read_config(cls, config_path), device=device)
        weights = torch.load(weights_path, map_location="cpu", weights_only=True)
        # torch.compile wraps the model, or single blocks, in a module of that name.
        model.load_state_dict({k.replace("_orig_mod.", ""): w for k, w in weights.items()})
        return model


def _head_dim(d_model: int, num_heads: int) -> int:
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(
            "CausalMultiHeadSelfAttention: num_heads must divide d_model "
            f"{d_model}, got {num_heads}"
        )
    return d_model // num_heads


def _read_config(model_class: type[BasicsTransformerLM], path: Path) -> dict[str, Any]:
    config = json.loads(path.read_text(encoding="utf-8"))
    try:
        inspect.signature(model_class).bind(**config)
    except TypeError as error:
        names = "the constructor's arguments"
        raise ValueError(f"from_pretrained: {path.name} must hold {names}, got: {error}") from None
    return config


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and give each module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
