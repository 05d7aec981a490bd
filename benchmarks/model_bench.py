"""The language model as a workload: its five passes, prepared so that the clock sees only what it
should."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from cases import refuse_unmet
from cs336_basics.nn_utils import cross_entropy, softmax
from cs336_basics.optimizer import AdamW

from cs336_systems.accounting import least_bytes, pass_flops
from cs336_systems.attention import DEFAULT_ATTENTION
from cs336_systems.config import preset
from cs336_systems.measure.counts import count_operators
from cs336_systems.measure.memory import available_bytes, gib, saved_bytes
from cs336_systems.measure.profile import Ranges, annotated_attention
from cs336_systems.measure.record import Case
from cs336_systems.measure.workload import NotMeasured, Workload
from cs336_systems.model import build_model, compile_model

LEARNING_RATE = 1e-10
"""Too small to change an fp32 weight: steps repeat, and a random model stays one."""


KEEPS_SCORES = ("scaled_dot_prod_attention", "vectorized_torch")
"""Attention rows that are sure to hold whole matrices of scores for the backward pass."""


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """Which model is run, and how."""

    size: str
    context: int
    precision: str
    compile_mode: str
    attention: str
    batch_size: int
    device: torch.device

    def record_case(self, study: str, which: str, **extra: int) -> Case:
        """Return the case of pass `which`, with its tokens, FLOPs and baseline."""
        config = preset(self.size, context_length=self.context)
        return Case(
            study=study,
            params={
                "size": self.size,
                "context": self.context,
                "precision": self.precision,
                "compile": self.compile_mode,
                "pass": which,
                **({} if self.attention == DEFAULT_ATTENTION else {"attention": self.attention}),
                **({} if self.batch_size == 4 else {"batch": self.batch_size}),
                **extra,
            },
            tokens=self.batch_size * self.context,
            flops=pass_flops(config, self.batch_size, self.context, which),
            flops_dtype=self.precision,
            baseline={"precision": "fp32", "compile": "eager"},
        )

    def refuse_what_cannot_fit(self, which: str) -> None:
        """Raise NotMeasured when the least that pass `which` needs is more than the device has."""
        config = preset(self.size, context_length=self.context)
        need = least_bytes(
            config,
            self.batch_size,
            self.context,
            which,
            half=self.precision == "bf16",
            scores_kept=1 if self.attention in KEEPS_SCORES else 0,
        )
        have = available_bytes(self.device)
        if have is not None and need > have:
            reason = f"predicted: needs at least {gib(need)}, the device has {gib(have)}"
            raise NotMeasured("oom", reason, predicted_bytes=need)

    def refuse_what_is_missing(self) -> None:
        """Raise NotMeasured when the attention row cannot run here."""
        dtype = "bf16" if self.precision == "bf16" else "fp32"
        refuse_unmet(self.attention, self.device, dtype, preset(self.size).d_head)


class ModelBench:
    """One built model with a random batch and its optimizer."""

    def __init__(self, case: ModelCase, *, nvtx: bool = False) -> None:
        torch.compiler.reset()
        torch.manual_seed(0)
        self.case = case
        self._nvtx = nvtx
        self._ranges = Ranges(nvtx)
        self._config = preset(case.size, context_length=case.context)
        self.model = build_model(self._config, attention=case.attention, device=case.device)
        if nvtx and case.attention == DEFAULT_ATTENTION:
            for layer in self.model.layers:
                layer.attn.attention_fn = (
                    None  # The model's own, which NVTX ranges can be put into.
                )
        compile_model(self.model, case.compile_mode)
        shape = (case.batch_size, case.context)
        self._tokens = torch.randint(self._config.vocab_size, shape, device=case.device)
        self._targets = torch.randint(self._config.vocab_size, shape, device=case.device)
        self._loss: torch.Tensor | None = None
        self._optimizer = self._fresh_optimizer()

    def workload(self, which: str, *, counted: bool = False) -> Workload:
        """Return pass `which` from a clean state: no gradients, no optimizer state, no graph."""
        self._loss = None
        self.model.zero_grad(set_to_none=True)
        self._optimizer = self._fresh_optimizer()
        step, setup = self._passes()[which]
        step = self._annotated(step)
        if which == "optimizer":
            for parameter in self.model.parameters():
                parameter.grad = torch.randn_like(parameter)
        return Workload(
            step=step,
            setup=setup,
            check=self._check,
            count=lambda: self._counts(which, step, setup, counted),
        )

    def _passes(self) -> dict[str, tuple[Callable[[], object], Callable[[], object] | None]]:
        return {
            "forward": (self._inference, None),
            "forward_backward": (self._forward_backward, None),
            "full_step": (self._full_step, None),
            "backward": (self._backward, self._prepare_backward),
            "optimizer": (self._step, None),
        }

    def _fresh_optimizer(self) -> AdamW:
        return AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        if self.case.precision == "bf16":
            return torch.autocast(self.case.device.type, torch.bfloat16)
        return nullcontext()

    def _forward(self) -> torch.Tensor:
        with self._ranges("forward"), self._autocast():
            return cross_entropy(self.model(self._tokens), self._targets)

    def _inference(self) -> torch.Tensor:
        with torch.no_grad():
            return self._forward()

    def _prepare_backward(self) -> None:
        # Frees a graph that no backward pass has used up before the next is built.
        self._loss = None
        self.model.zero_grad(set_to_none=True)
        self._loss = self._forward()

    def _backward(self) -> None:
        assert self._loss is not None
        with self._ranges("backward"):
            self._loss.backward()
        self._loss = None

    def _forward_backward(self) -> None:
        self._prepare_backward()
        self._backward()

    def _step(self) -> None:
        with self._ranges("optimizer"):
            self._optimizer.step()

    def _full_step(self) -> None:
        self._forward_backward()
        self._step()

    def _annotated(self, step: Callable[[], object]) -> Callable[[], object]:
        if not self._nvtx and self.case.precision != "tf32":
            return step

        def run() -> object:
            with annotated_attention(self._nvtx, softmax), tf32(self.case.precision == "tf32"):
                return step()

        return run

    def _check(self) -> None:
        """A random model's loss is the entropy of guessing, whatever kernels computed it."""
        loss = self._inference().item()
        guessing = math.log(self._config.vocab_size)
        assert abs(loss - guessing) < 0.5, f"loss {loss} of a random model, expected {guessing:.2f}"
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                norm = parameter.grad.norm().item()
                assert math.isfinite(norm), f"gradient of {name} has norm {norm}"

    def _counts(
        self,
        which: str,
        step: Callable[[], object],
        setup: Callable[[], object] | None,
        counted: bool,
    ) -> dict[str, int]:
        counts = {}
        if counted:
            if setup is not None:
                setup()
            counts.update(count_operators(self.case.device, step))
        if which == "forward_backward" and self.case.compile_mode == "eager":
            counts["saved_bytes"] = saved_bytes(self._forward, self.model.parameters())
        return counts


class ModelSlot:
    """Holds at most one model: the passes of one case share it and the next case finds room."""

    def __init__(self) -> None:
        self._bench: ModelBench | None = None

    def get(self, case: ModelCase, *, nvtx: bool = False) -> ModelBench:
        """Return the bench of `case`, building it if the slot holds another."""
        if self._bench is None or self._bench.case != case:
            self.clear()
            self._bench = ModelBench(case, nvtx=nvtx)
        return self._bench

    def clear(self) -> None:
        """Free the model."""
        self._bench = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Let fp32 products round their inputs to tf32 inside the block, or do not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
