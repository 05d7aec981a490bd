"""FSDP in use: modules of every kind, calls at any moment, and what mistakes lead to."""

from __future__ import annotations

import fsdp_modules
import fsdp_runs
import pytest
import torch
from fsdp_models import Case, same_bits, train_on_rank
from parallel_fixtures import BACKENDS, ON_RANKS
from ranks import pool

pytestmark = ON_RANKS


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", fsdp_modules.MODULES)
def test_modules_of_every_kind(name: str, world_size: int) -> None:
    wanted = fsdp_modules.train(name, world_size)
    for state in pool(world_size).run(fsdp_modules.train_on_rank, name):
        torch.testing.assert_close(state, wanted)


def test_ranks_may_train_in_groups() -> None:
    wanted = fsdp_modules.train("fused", 2)
    for state in pool(4).run(fsdp_modules.train_on_rank, "fused", [[0, 2], [1, 3]]):
        torch.testing.assert_close(state, wanted)


@pytest.mark.parametrize(("dtype", "budget"), [(None, 1e-6), (torch.float16, 1e-4)])
def test_the_courses_hooks(dtype: torch.dtype | None, budget: float) -> None:
    by_rank = pool(2).run(fsdp_modules.use_the_course_hooks, dtype)
    total = 0
    for plain, sharded, dtypes, numel in by_rank:
        assert sharded.keys() == plain.keys()
        torch.testing.assert_close(sharded, dict(plain), rtol=0.0, atol=budget)
        assert dtypes == {torch.float32}
        total += numel
    num_replicated = sum(w.numel() for name, w in plain.items() if ".ln" in f".{name}")
    assert total == sum(w.numel() for w in plain.values()) + num_replicated


@pytest.mark.parametrize(("how_many", "expected"), [(True, 4), (2, 2), (9, 4), (0, 0)])
def test_as_many_blocks_as_asked_are_recomputed(how_many: bool | int, expected: int) -> None:
    assert pool(1).run(fsdp_modules.num_recomputed, how_many) == [expected]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interlude", fsdp_runs.INTERLUDES)
@pytest.mark.parametrize("reshard", [True, False])
def test_other_calls_between_forward_backward_and_step(
    interlude: str, reshard: bool, backend: str
) -> None:
    case = Case(options={"reshard_after_forward": reshard})
    plain = pool(2, backend).run(train_on_rank, case)
    for got, wanted in zip(
        pool(2, backend).run(fsdp_runs.step_with_interludes, case, interlude), plain, strict=True
    ):
        assert same_bits(got.state, wanted.state)
        assert got.norms == wanted.norms


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_gives_the_plain_outputs_and_keeps_nothing(world_size: int) -> None:
    for without, with_grad, plain, rest in pool(world_size).run(fsdp_runs.outputs, Case()):
        assert torch.equal(without, plain)
        assert torch.equal(with_grad, plain)
        assert rest == 0


def test_the_wrapped_module_can_be_used_by_itself() -> None:
    for said, said_in_shards in pool(2).run(fsdp_runs.generate, torch.arange(4)):
        assert torch.equal(said, said_in_shards)


def test_a_layer_sees_its_weights_as_they_are_now() -> None:
    for said, wanted in pool(2).run(fsdp_runs.call_after_change, Case()):
        assert torch.equal(said, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropped", ["unfinished", "accumulated"])
def test_zero_grad_takes_back_unfinished_gradients(dropped: str, backend: str) -> None:
    for with_drop, without in pool(2, backend).run(fsdp_runs.drop_gradients, Case(), dropped):
        assert same_bits(with_drop.state, without.state)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "options", [{}, {"compute_dtype": torch.bfloat16}, {"checkpoint_blocks": 2}]
)
def test_blocks_may_be_compiled(when: str, options: dict[str, object]) -> None:
    for compiled, eager in pool(2).run(fsdp_runs.train_compiled, Case(options=options), when):
        assert same_bits(compiled.state, eager.state)
        assert compiled.norms == eager.norms


MESSAGES = {
    "missing": "UsageError: fsdp: every trainable parameter must get a gradient, got none for "
    "'sometimes.weight' on 1 rank, 'sometimes.bias' on 1 rank (of 2); find_unused=True allows it",
    "frozen_later": "UsageError: fsdp: requires_grad must stay as it was wrapped, got a change of "
    "'head.weight' on 2 ranks; wrap the module again",
    "order": "UsageError: fsdp: every rank must run the same layers in the same order, as each "
    "gathers weights from all ranks; got different orders",
    "clip": "UsageError: fsdp: finish_gradient_synchronization must be called before clipping",
    "nonfinite": "NonFiniteGradientError: gradients must be finite, got inf or nan on rank 1",
    "nonfinite_norm": "RuntimeError: fsdp: gradients must have a finite norm, got nan",
    "changed": "RuntimeError: fsdp: weights must stay as they were until the backward pass of "
    "their call, got changed ones in 'head'",
    "twice": "UsageError: fsdp: module must be wrapped once, got one that is wrapped already",
    "moved": "UsageError: fsdp: module must be moved or cast before it is wrapped",
    "assign": "UsageError: fsdp: load_state_dict must copy into the shards, got assign=True",
    "whole": "UsageError: fsdp: load_state_dict must get this rank's pieces, got the whole "
    "'embedding.weight'; load_full_state_dict takes it",
    "names": "UsageError: fsdp: state must have the module's names, got missing "
    "'blocks.0.inner.0.weight'",
    "shape": "UsageError: fsdp: state 'head.weight' must have shape (11, 5), got (2,)",
    "sparse": "UsageError: FSDP: embedding '' must have dense gradients, got 'sparse=True'",
    "max_norm": "UsageError: FSDP: embedding '' must have no max_norm, got 1.0",
    "compute_dtype": "UsageError: fsdp: compute_dtype must be floating, got torch.int8",
    "checkpoint_blocks": "UsageError: fsdp: checkpoint_blocks must be >= 0, got -1",
    "option": "UsageError: wrap fsdp: option must be one of compute_dtype, reshard_after_forward, "
    "checkpoint_blocks, group, communication_dtype, find_unused, check_finite, broadcast_buffers, "
    "got 'shard'",
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", fsdp_runs.MISTAKES)
def test_mistakes_are_the_same_error_on_every_rank(name: str, backend: str) -> None:
    assert pool(2, backend).run(fsdp_runs.message_of, name, Case(depth=2)) == [MESSAGES[name]] * 2
