"""The layers of a Transformer that do not look across positions.

Every constructor takes the device and dtype of its weights, so that a large model is created where
it will live. On the meta device nothing is allocated: `module.to_empty(device=...)` followed by
`reset_parameters()` then initialises it in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cs336_basics.nn_utils import checked_ids

Device = torch.device | str | int | None


class Linear(nn.Module):
    """Matrix product x W^T without a bias.

    Shapes: x (..., d_in), weight (d_out, d_in), result (..., d_out).
    """

    def __init__(
        self, d_in: int, d_out: int, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.weight = nn.Parameter(torch.empty(d_out, d_in, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        _draw_truncated_normal(self.weight, std=math.sqrt(2 / (self.d_in + self.d_out)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_out={self.d_out}"


class Embedding(nn.Module):
    """One row of the weight per token id.

    Shapes: token_ids (...), weight (vocab, d_model), result (..., d_model).
    Raises: ValueError for ids that are not integers or, on the CPU, outside the vocabulary.
    """

    def __init__(
        self, vocab_size: int, d_model: int, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.vocab_size, self.d_model = vocab_size, d_model
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        _draw_truncated_normal(self.weight, std=1.0)

    def forward(self, token_ids: Tensor) -> Tensor:
        ids = checked_ids("Embedding", "token ids", token_ids, self.vocab_size)
        return F.embedding(ids, self.weight)

    def extra_repr(self) -> str:
        return f"vocab_size={self.vocab_size}, d_model={self.d_model}"


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dim, then scale each channel.

    Shapes: x (..., hidden_size), weight (hidden_size,), result as x in shape and dtype.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", eq. 4.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every channel's scale to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        # The square of an fp16 value overflows above 255, and bf16 sums lose small terms.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (self.weight * (wide * inverse_rms)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, eps={self.eps}"


class RotaryEmbedding(nn.Module):
    """Turn each pair of neighbouring channels by an angle proportional to the position.

    Shapes: x (..., seq, dim), pos_ids (..., seq) broadcast against x; None means 0 ... seq-1.
    Raises: ValueError for an odd dim, for more positions than the table has and, where `pos_ids`
        is on the CPU and not traced, for positions outside the table.
    Source: Su et al., "RoFormer", eq. 34.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        context_length: int,
        dim: int,
        theta: float = 10000.0,
        device: Device = None,
        dtype: torch.dtype | None = None,  # as every layer takes one; the tables stay fp32
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"RotaryEmbedding: dim must be even, got {dim}")
        self.context_length, self.dim, self.theta = context_length, dim, theta
        self._build_tables(torch.get_default_device() if device is None else torch.device(device))

    def reset_parameters(self) -> None:
        """Compute the tables anew, where they are now."""
        self._build_tables(self.cos.device)

    def forward(self, x: Tensor, pos_ids: Tensor | None = None) -> Tensor:
        if x.ndim < 2 or x.shape[-1] != self.dim:
            raise ValueError(
                f"RotaryEmbedding: x must be (..., seq, {self.dim}), got {tuple(x.shape)}"
            )
        cos, sin = self._rows_for(x.shape[-2], pos_ids)  # (seq or pos_ids' shape, dim/2)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        first, second = wide.unflatten(-1, (self.dim // 2, 2)).unbind(-1)  # (..., seq, dim/2) each
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
        return turned.flatten(-2).to(x.dtype)

    def extra_repr(self) -> str:
        return f"context_length={self.context_length}, dim={self.dim}, theta={self.theta}"

    def _rows_for(self, seq: int, pos_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        if pos_ids is None:
            if seq > self.context_length:
                raise ValueError(
                    "RotaryEmbedding: sequence length must be at most the table's "
                    f"{self.context_length}, got {seq}"
                )
            return self.cos[:seq], self.sin[:seq]  # views: no gather, no copy
        if pos_ids.ndim == 0 or pos_ids.shape[-1] != seq:
            raise ValueError(
                f"RotaryEmbedding: pos_ids must be (..., {seq}), got {tuple(pos_ids.shape)}"
            )
        pos_ids = checked_ids("RotaryEmbedding", "pos_ids", pos_ids, self.context_length)
        return self.cos[pos_ids], self.sin[pos_ids]

    def _build_tables(self, device: torch.device) -> None:
        # In fp64, since fp32 angles near position 32768 are off by thousandths of a radian; on the
        # host, so that every device holds the same table.
        channel = torch.arange(0, self.dim, 2, dtype=torch.float64, device="cpu")
        position = torch.arange(self.context_length, dtype=torch.float64, device="cpu")
        angles = torch.outer(position, self.theta ** (-channel / self.dim))
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, table.to(device, torch.float32), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the module, but stay fp32 under `.to(dtype)` and be right after `.to_empty`."""
        was_meta = self.cos.is_meta
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32 or (was_meta and not self.cos.is_meta):
            self.reset_parameters()
        return self


class SwiGLU(nn.Module):
    """Feed-forward layer with a gate: w2(silu(w1 x) * w3 x).

    Shapes: x (..., d_model), result (..., d_model).
    Source: Shazeer, "GLU Variants Improve Transformer", eq. 6.
    """

    def __init__(
        self, d_model: int, d_ff: int, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.w1 = Linear(d_model, d_ff, device, dtype)
        self.w2 = Linear(d_ff, d_model, device, dtype)
        self.w3 = Linear(d_model, d_ff, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def _draw_truncated_normal(weight: Tensor, std: float) -> None:
    """Fill with a normal distribution of deviation `std`, cut at three of them."""
    if weight.dtype in (torch.float16, torch.bfloat16):
        # The inverse CDF of a uniform bf16 number takes only 256 values and misses the tails.
        drawn = torch.empty_like(weight, dtype=torch.float32)
        nn.init.trunc_normal_(drawn, std=std, a=-3 * std, b=3 * std)
        with torch.no_grad():
            weight.copy_(drawn)
    else:
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
