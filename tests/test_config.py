"""Presets, the closed forms over them, and the model built from them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cs336_basics.nn_utils import cross_entropy
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from cs336_systems.accounting import (
    PASSES,
    attention_bytes,
    attention_flops,
    forward_flops,
    least_bytes,
    parameters,
    pass_flops,
)
from cs336_systems.attention import ATTENTION
from cs336_systems.config import PRESETS, ModelConfig, preset
from cs336_systems.errors import UsageError
from cs336_systems.measure.memory import saved_bytes
from cs336_systems.model import COMPILE_MODES, build_model, compile_model
from cs336_systems.table import has_compiler


def test_presets_are_the_handouts() -> None:
    sizes = {
        name: (c.d_model, c.d_ff, c.num_layers, c.num_heads, c.vocab_size)
        for name, c in PRESETS.items()
    }
    assert sizes["small"] == (768, 3072, 12, 12, 10_000)
    assert sizes["medium"] == (1024, 4096, 24, 16, 10_000)
    assert sizes["large"] == (1280, 5120, 36, 20, 10_000)
    assert sizes["xl"] == (1600, 6400, 48, 25, 10_000)
    assert sizes["2.7b"] == (2560, 10240, 32, 32, 10_000)
    assert sizes["8b"] == (4096, 11008, 34, 32, 151_936)
    assert PRESETS["8b"].context_length == 32_768
    assert {"tiny", "debug"} < set(PRESETS)


def test_config_is_frozen_and_survives_json() -> None:
    config = preset("tiny", context_length=7)
    assert ModelConfig(**dataclasses.asdict(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("huge"), "model config: preset must be one of debug, tiny, small"),
        (
            lambda: preset("tiny", num_heads=3),
            "model config: num_heads must divide d_model (128), got 3",
        ),
        (lambda: preset("tiny", num_layers=0), "model config: num_layers must be positive, got 0"),
        (lambda: preset("tiny", d_ff=2.5), "model config: d_ff must be an integer, got 2.5"),
        (lambda: preset("tiny", d_ff=True), "model config: d_ff must be an integer, got True"),
        (lambda: preset("tiny", num_heads=128), "model config: d_model / num_heads must be even"),
        (lambda: build_model(PRESETS["debug"], attention="x"), "attention: row must be one of"),
        (lambda: pass_flops(PRESETS["debug"], 1, 8, "sideways"), "accounting: pass must be one of"),
    ],
)
def test_errors_name_argument_rule_and_value(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError) as caught:
        call()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_is_the_models(name: str) -> None:
    with torch.device("meta"):
        model = build_model(PRESETS[name])
    assert parameters(PRESETS[name]).total == sum(p.numel() for p in model.parameters())


@given(context=st.integers(1, 48), batch_size=st.integers(1, 3))
def test_forward_flops_are_what_torch_counts(context: int, batch_size: int) -> None:
    """torch counts the whole square of scores; the model FLOPs leave the masked half out."""
    config = preset("debug", context_length=context)
    model = build_model(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(batch_size, context, dtype=torch.long))
    masked_half = 2.0 * batch_size * context**2 * config.d_model * config.num_layers
    assert counter.get_total_flops() == forward_flops(config, batch_size, context) + masked_half


def test_passes_add_up() -> None:
    flops = {which: pass_flops(PRESETS["tiny"], 4, 64, which) for which in PASSES}
    assert flops["optimizer"] is None
    assert flops["forward"] is not None
    assert flops["backward"] == 2 * flops["forward"]
    assert flops["full_step"] == flops["forward_backward"] == 3 * flops["forward"]


def test_least_bytes_is_a_lower_bound_of_what_is_kept() -> None:
    config = preset("tiny", context_length=64)
    model = build_model(config)
    tokens = torch.zeros(4, 64, dtype=torch.long)
    kept = saved_bytes(lambda: cross_entropy(model(tokens), tokens), model.parameters())
    weights = 4 * parameters(config).total
    for half in (False, True):
        need = least_bytes(config, 4, 64, "forward_backward", half=half, scores_kept=1)
        assert 2 * weights < need <= 2 * weights + kept
    assert least_bytes(config, 4, 64, "optimizer", half=False, scores_kept=1) == 4 * weights


def test_attention_flops_of_the_2025_harness() -> None:
    """16 heads of 64, 16384 tokens, causal, forward and backward: 1.92 TFLOP."""
    flops = attention_flops(1, 16, 16384, 64, "forward_backward", is_causal=True)
    assert flops == pytest.approx(1.924e12, rel=1e-3)


class TestModel:
    """Every attention row gives the same model."""

    def loss(self, attention: str, mode: str = "eager") -> torch.Tensor:
        torch.manual_seed(0)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = build_model(preset("debug", context_length=32), attention=attention, device=device)
        compile_model(model, mode)
        tokens = (torch.arange(64) % 128).reshape(2, 32).to(device)
        loss = cross_entropy(model(tokens), tokens)
        loss.backward()
        gradient = model.layers[0].attn.q_proj.weight.grad
        assert gradient is not None
        return torch.stack([loss.detach(), gradient.norm()])

    @pytest.mark.parametrize("attention", ATTENTION)
    def test_rows_agree(self, attention: str) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        unmet = ATTENTION[attention].unmet(device=device, dtype="fp32")
        if unmet is not None:
            pytest.skip(f"{attention}: {unmet.reason}")
        torch.testing.assert_close(
            self.loss(attention), self.loss("scaled_dot_prod_attention"), rtol=1e-5, atol=1e-6
        )

    def test_loss_of_a_random_model_is_that_of_guessing(self) -> None:
        assert self.loss("sdpa")[0].item() == pytest.approx(math.log(128), abs=0.5)

    @pytest.mark.parametrize("mode", COMPILE_MODES)
    def test_compiled_modes_agree(self, mode: str) -> None:
        if mode != "eager" and not has_compiler():
            pytest.skip("needs a C++ compiler, found none on PATH")
        torch.testing.assert_close(self.loss("sdpa", mode), self.loss("sdpa"), rtol=1e-4, atol=1e-5)

    def test_compiling_keeps_parameter_names(self) -> None:
        model = build_model(PRESETS["debug"])
        names = list(model.state_dict())
        assert list(compile_model(model, "blocks").state_dict()) == names
        assert "layers.0.attn.q_proj.weight" in names

    def test_unknown_compile_mode(self) -> None:
        with pytest.raises(
            UsageError, match="compile_model: mode must be one of eager, blocks, model"
        ):
            compile_model(build_model(PRESETS["debug"]), "all")


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 64), st.integers(1, 64), st.booleans())
def test_attention_bytes_are_those_of_its_tensors(
    batch_size: int, num_heads: int, seq: int, head_dim: int, half: bool
) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    tensor = torch.empty(batch_size, num_heads, seq, head_dim, dtype=dtype)
    size = (batch_size, num_heads, seq, head_dim)
    for which, names in {
        "forward": "q k v o",
        "backward": "q k v o do dq dk dv",
        "forward_backward": "q k v o do dq dk dv",
    }.items():
        expected = len(names.split()) * tensor.nbytes
        assert attention_bytes(*size, which, element_bytes=dtype.itemsize) == expected
