"""One attention row on one shape: its inputs, its passes as workloads, its errors against fp64."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cs336_systems.accounting import attention_bytes, attention_flops
from cs336_systems.attention.reference import reference_gradients
from cs336_systems.errors import bad
from cs336_systems.measure.memory import saved_bytes
from cs336_systems.measure.workload import Workload

PASSES = ("forward", "backward", "forward_backward")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CHECKED_ROWS = 64
"""Query rows, counted from the last, compared with fp64: the rows that see the most keys."""
ERROR_FACTOR = 3
"""How many times the plain formula's error in the same precision a row may err, beside rounding."""
_SHAPE = re.compile(r"B(\d+) H(\d+) S(\d+) D(\d+) (causal|full)")


class Shape(NamedTuple):
    """What attention is run on: (batch, heads, seq, d), and whether it is causal."""

    batch: int
    heads: int
    seq: int
    d: int
    causal: bool = True

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"B{self.batch} H{self.heads} S{self.seq} D{self.d} {mask}"

    @classmethod
    def parse(cls, name: str) -> Shape:
        """Return the shape of a name.

        Raises: UsageError for a name of another form.
        """
        found = _SHAPE.fullmatch(name)
        sizes = [] if found is None else [int(size) for size in found.groups()[:4]]
        if found is None or 0 in sizes:
            raise bad("benchmarks", "--shapes", "list names like B1 H16 S16384 D64 causal", name)
        return cls(*sizes, causal=found[5] == "causal")

    def flops(self, which: str) -> float:
        """Return the FLOPs that one pass over this shape is credited with."""
        return attention_flops(*self[:4], which, is_causal=self.causal)

    def least_bytes(self, which: str, dtype: str) -> int:
        """Return the bytes that one pass over this shape must move."""
        return attention_bytes(*self[:4], which, element_bytes=DTYPES[dtype].itemsize)


Function = Callable[..., Tensor]


class AttentionBench:
    """Random inputs (..., seq, d) for one row, and the passes over them; with `num_keys` keys in
    place of seq."""

    def __init__(
        self,
        function: Function,
        size: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_causal: bool = True,
        num_keys: int | None = None,
    ) -> None:
        torch.manual_seed(0)
        keys_size = (*size[:-2], size[-2] if num_keys is None else num_keys, size[-1])
        self._function = partial(function, is_causal=is_causal)
        self._device = device
        self._is_causal = is_causal
        self._inputs = [
            torch.randn(each, dtype=dtype, device=device, requires_grad=True)
            for each in (size, keys_size, keys_size)
        ]
        self._grad_output = torch.randn(size, dtype=dtype, device=device)
        self._output: Tensor | None = None

    def workload(self, which: str) -> Workload:
        """Return a pass; backward alone has a fresh forward before every round."""
        if which == "forward":
            return Workload(step=self._forward, check=self._check_forward)
        if which == "forward_backward":
            return Workload(
                step=self._forward_backward, check=self._check_backward, count=self._count
            )
        return Workload(
            step=self._backward,
            setup=self._forward,
            check=self._check_backward,
            metrics=self._memory_before_backward,
            count=self._count,
        )

    def errors(self) -> dict[str, float | None]:
        """Return the largest and the root-mean-square error of o, dq, dk and dv against fp64."""
        exact = reference_gradients(*self._inputs, self._grad_output, is_causal=self._is_causal)
        truths = {"o": exact.o, "dq": exact.dq, "dk": exact.dk, "dv": exact.dv}
        errors: dict[str, float | None] = {}
        for (name, truth), got in zip(truths.items(), self._results(), strict=True):
            error = got.double() - truth
            errors[f"{name}_max_error"] = error.abs().max().item()
            errors[f"{name}_rms_error"] = error.square().mean().sqrt().item()
        return errors

    def _forward(self) -> None:
        self._output = None
        self._output = self._function(*self._inputs)

    def _backward(self) -> None:
        self._gradients()

    def _forward_backward(self) -> None:
        self._forward()
        self._backward()

    def _gradients(self) -> tuple[Tensor, ...]:
        assert self._output is not None
        return torch.autograd.grad(self._output, self._inputs, self._grad_output)

    def _results(self) -> list[Tensor]:
        """Run both passes and return o, dq, dk and dv."""
        self._forward()
        assert self._output is not None
        return [self._output.detach(), *self._gradients()]

    def _count(self) -> dict[str, int]:
        return {"saved_bytes": saved_bytes(self._forward)}

    def _memory_before_backward(self) -> dict[str, float | None]:
        self._forward()
        if self._device.type != "cuda":
            return {}
        torch.cuda.synchronize(self._device)
        return {"before_backward_bytes": float(torch.cuda.memory_allocated(self._device))}

    def _check_forward(self) -> None:
        self._forward()
        assert self._output is not None
        self._check([self._output.detach()])

    def _check_backward(self) -> None:
        self._check(self._results())

    def _check(self, results: list[Tensor]) -> None:
        """Hold the last rows of the first head to the plain formula's error in this precision."""
        q, k, v, grad = (_first(tensor.detach()) for tensor in (*self._inputs, self._grad_output))
        plain, truth = (
            last_rows(*(tensor.to(dtype) for tensor in (q, k, v, grad)), self._is_causal)
            for dtype in (q.dtype, torch.float64)
        )
        names = ("o", "dq", "dk", "dv")[: len(results)]
        for name, got, near, exact in zip(names, results, plain, truth, strict=False):
            rows = _first(got)[-len(exact) :]
            # What rounding the sum's terms in fp32 and the result errs at the least.
            rounding = (
                torch.finfo(torch.float32).eps * _largest_term(name, q, k, v, grad)
                + torch.finfo(q.dtype).eps * exact.abs().max().item()
            )
            budget = ERROR_FACTOR * (near - exact).abs().max().item() + rounding
            error = (rows - exact).abs().max().item()
            assert error <= budget, f"{name}: max error {error:.2e} in fp64, budget {budget:.2e}"


def last_rows(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, is_causal: bool) -> list[Tensor]:
    """Return the last rows of o and dq by the plain formula, and of dk and dv where they need no
    others.

    The last keys are seen by the last queries alone when the mask is causal and there are as many
    keys as queries; otherwise every query may add to every key's gradient.
    Shapes: q and grad (queries, d), k and v (keys, d) -> (min(queries, CHECKED_ROWS), d) each.
    """
    queries, num_rows = len(q), min(len(q), CHECKED_ROWS)
    leaves = [tensor.clone().requires_grad_() for tensor in (q[-num_rows:], k, v)]
    scores = leaves[0] @ leaves[1].T / q.shape[-1] ** 0.5
    if is_causal:
        rows = torch.arange(queries - num_rows, queries, device=q.device)
        seen = rows[:, None] >= torch.arange(len(k), device=q.device)
        scores = scores.masked_fill(~seen, float("-inf"))
    o = torch.softmax(scores, dim=-1) @ leaves[2]
    dq, dk, dv = torch.autograd.grad(o, leaves, grad[-num_rows:])
    whole = (is_causal and len(k) == queries) or num_rows == queries
    return [o.detach(), dq, *((dk[-num_rows:], dv[-num_rows:]) if whole else ())]


def _largest_term(name: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> float:
    # A bound: a score's gradient is at most its weight times |do| |v| sqrt(d) and the scale.
    largest = {
        x: tensor.abs().max().item() for x, tensor in zip("qkvg", (q, k, v, grad), strict=True)
    }
    score = largest["g"] * largest["v"]
    return {
        "o": largest["v"],
        "dq": score * largest["k"],
        "dk": score * largest["q"],
        "dv": largest["g"],
    }[name]


def _first(tensor: Tensor) -> Tensor:
    """Return the first batch element's first head, (seq, d)."""
    return tensor.flatten(0, -3)[0]
