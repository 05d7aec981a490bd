"""What ranks run for the tests of FSDP beyond plain training; imports no pytest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from cs336_basics.model import BasicsTransformerLM
from fsdp_models import Case, Trained, batch, initial_net, loss_of, start, train_step
from torch import Tensor, nn

from cs336_systems.errors import UsageError
from cs336_systems.parallel import wrap
from cs336_systems.parallel.collectives import communication_device, record_collectives
from cs336_systems.parallel.report import NonFiniteGradientError


def loss_on_rank(model: Callable[..., Tensor], case: Case, step: int = 0, micro: int = 0) -> Tensor:
    tokens, use = batch(case, step, micro, dist.get_rank())
    return loss_of(model, case, tokens.to(communication_device()), use)


def train_steps(case: Case, num_steps: int) -> dict[str, Tensor]:
    model, optimizer, _ = start(case)
    for step in range(num_steps):
        train_step(case, model, optimizer, step)
    return dict(model.full_state_dict())


def describe_gradients(case: Case) -> dict[str, Any]:
    """Return what holds of every piece and its gradient after one step's backward pass."""
    model, _, _ = start(case)
    before = [p.grad for p in model.parameters()]
    loss_on_rank(model, case).backward()
    model.finish_gradient_synchronization()
    named = list(model.module.named_parameters())
    pieces = [piece for unit in model.units for flat in unit.flats for piece in flat.pieces]
    storages = {
        unit.name: {piece.grad.untyped_storage().data_ptr() for piece in unit.flats[0].pieces}
        for unit in model.units
    }
    return {
        "none_before": all(grad is None for grad in before),
        "names": [name for name, _ in named],
        "fit": all(p.grad.shape == p.shape and p.grad.dtype == p.dtype for _, p in named),
        "dtypes": {p.dtype for _, p in named},
        "dims": {piece.ndim for piece in pieces},
        "numel": sum(piece.numel() for piece in pieces),
        "num_storages": {name: len(pointers) for name, pointers in storages.items()},
    }


def log_of_steps(case: Case, num_steps: int = 3) -> list[list[tuple[str, int, str]]]:
    """Return each step's collectives: name, elements, dtype."""
    model, optimizer, _ = start(case)
    logs = []
    for step in range(num_steps):
        with record_collectives() as log:
            train_step(case, model, optimizer, step)
        logs.append([(c.name, c.numel, str(c.dtype).removeprefix("torch.")) for c in log])
    return logs


def unit_sizes(case: Case) -> dict[str, int]:
    """Return the elements of each unit's gathered vector."""
    model, _, _ = start(case)
    return {unit.name: sum(f.layout.padded_numel for f in unit.flats) for unit in model.units}


def gathered_bytes(case: Case, num_steps: int = 3) -> tuple[list[int], list[int], list[int]]:
    """Return each unit's bytes, and the gathered bytes' peak and rest after every step."""
    model, optimizer, _ = start(case)
    peaks, rests = [], []
    for step in range(num_steps):
        train_step(case, model, optimizer, step)
        peaks.append(model.gathered_bytes_peak)
        rests.append(sum(f._storage.nbytes() for unit in model.units for f in unit.flats))
    sizes = [f.layout.padded_numel * f.compute_dtype.itemsize for u in model.units for f in u.flats]
    return sizes, peaks, rests


def step_with_interludes(case: Case, interlude: str) -> Trained:
    """Train while something else happens between forward, backward and step."""
    model, optimizer, norms = start(case)
    for step in range(case.num_steps):
        optimizer.zero_grad()
        loss = loss_on_rank(model, case, step)
        INTERLUDES[interlude](model, case)
        loss.backward()
        INTERLUDES[interlude](model, case)
        model.finish_gradient_synchronization()
        norms.append(model.clip_grad_norm(1e9).item())
        INTERLUDES[interlude](model, case)
        optimizer.step()
    return Trained(dict(model.full_state_dict()), norms, {})


def _evaluate(model: nn.Module, case: Case) -> None:
    with torch.no_grad():
        loss_on_rank(model, case, 77)


def _infer(model: nn.Module, case: Case) -> None:
    with torch.inference_mode():
        loss_on_rank(model, case, 78)


def _call_a_part(model: nn.Module, case: Case) -> None:
    device = communication_device()
    x = torch.ones(2, case.width, dtype=case.dtype, device=device, requires_grad=True)
    before = [p.grad for p in model.parameters()]
    (gradient,) = torch.autograd.grad(model.module.blocks[0](x)["x"].sum(), x)
    assert gradient.shape == x.shape
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert parameter.grad is grad


def _forward_in_vain(model: nn.Module, case: Case) -> None:
    loss_on_rank(model, case, 79)


INTERLUDES: dict[str, Callable[[nn.Module, Case], None]] = {
    "evaluation": _evaluate,
    "inference": _infer,
    "part": _call_a_part,
    "forward": _forward_in_vain,
}


def outputs(case: Case) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return the wrapped module's output without gradients, with them, and the plain module's."""
    net = initial_net(case)
    tokens, use = batch(case, 0, 0, 0)
    plain = net(tokens, use).detach()
    model = wrap(initial_net(case), "fsdp")
    with torch.no_grad():
        without = model(tokens, use)
    rest = sum(f._storage.nbytes() for unit in model.units for f in unit.flats)
    return without, model(tokens, use).detach(), plain, rest


def call_after_change(case: Case) -> tuple[Tensor, Tensor]:
    """Return what the head says after its weights were changed, and the plain module's answer."""
    net, model = initial_net(case), wrap(initial_net(case), "fsdp")
    x = torch.ones(2, case.width)
    loss_on_rank(model, case)  # leaves the head gathered, for a backward pass that never comes
    with torch.no_grad():
        for parameter in (*net.parameters(), *model.parameters()):
            parameter.mul_(2)
    return model.module.head(x).detach(), net.head(x).detach()


def generate(prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a wrapped and a plain language model say, greedily."""
    torch.manual_seed(1)
    model = BasicsTransformerLM(20, 16, 8, 2, 2, 12)
    said = model.generate(prompt, 5, temperature=0.0)
    sharded = wrap(model, "fsdp")
    return said, sharded.module.generate(prompt, 5, temperature=0.0)


def drop_gradients(case: Case, dropped: str) -> tuple[Trained, Trained]:
    """Run a backward pass whose gradients are taken away, then train; and train only."""
    results = []
    for drops in (True, False):
        model, optimizer, norms = start(case)
        if drops:
            if dropped == "unfinished":
                loss_on_rank(model, case, 5).backward()
            elif dropped == "accumulated":
                with model.no_sync():
                    loss_on_rank(model, case, 5).backward()
            optimizer.zero_grad()
        for step in range(2):
            norms.append(train_step(case, model, optimizer, step))
        results.append(Trained(dict(model.full_state_dict()), norms, {}))
    return results[0], results[1]


def accumulate_in_shards(case: Case) -> tuple[Trained, int]:
    """Train with several backward passes per step, each of which is reduced."""
    model, optimizer, norms = start(case)
    with record_collectives() as log:
        for step in range(case.num_steps):
            optimizer.zero_grad()
            for micro in range(case.num_micro_batches):
                loss_on_rank(model, case, step, micro).backward()
            model.finish_gradient_synchronization()
            norms.append(model.clip_grad_norm(1e9).item())
            optimizer.step()
    num_reduced = sum(c.name == "reduce_scatter_into" for c in log)
    return Trained(dict(model.full_state_dict()), norms, {}), num_reduced


def train_compiled(case: Case, when: str) -> tuple[Trained, Trained]:
    """Train with blocks compiled before or after they are wrapped, and not compiled."""
    results = []
    for compiles in (True, False):
        torch.manual_seed(3)
        model = BasicsTransformerLM(11, 8, 8, 3, 2, 12)
        if compiles and when == "before":
            _compile_blocks(model)
        sharded = wrap(model, "fsdp", **case.options)
        if compiles and when == "after":
            _compile_blocks(model)
        optimizer = sharded.build_optimizer(torch.optim.SGD, lr=0.1)
        norms = []
        for step in range(3):
            tokens, _ = batch(case, step, 0, dist.get_rank())
            optimizer.zero_grad()
            sharded(tokens).float().square().mean().backward()
            sharded.finish_gradient_synchronization()
            norms.append(sharded.clip_grad_norm(1e9).item())
            optimizer.step()
        results.append(Trained(dict(sharded.full_state_dict()), norms, {}))
    return results[0], results[1]


def _compile_blocks(model: BasicsTransformerLM) -> None:
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)


def train_under_autocast(case: Case) -> Trained:
    """Train in autocast to bf16."""
    model, optimizer, norms = start(case)
    for step in range(case.num_steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_on_rank(model, case, step)
        loss.backward()
        model.finish_gradient_synchronization()
        norms.append(model.clip_grad_norm(1e9).item())
        optimizer.step()
    return Trained(dict(model.full_state_dict()), norms, {})


def gaps_of_shards(case: Case) -> list[float]:
    """Return what is in the shards outside of all pieces, after training."""
    model, optimizer, _ = start(case)
    for step in range(2):
        train_step(case, model, optimizer, step)
    found = []
    for unit in model.units:
        for flat in unit.flats:
            gaps = flat.shard.detach().clone()
            for index in range(len(flat.pieces)):
                flat.layout.piece(gaps, index).zero_()
            found.append(gaps.abs().sum().item())
    return found


def message_of(name: str, case: Case) -> str:
    """Return the error that a user's mistake leads to."""
    try:
        MISTAKES[name](case)
    except (UsageError, NonFiniteGradientError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _mistake_missing(case: Case) -> None:
    model, optimizer, _ = start(replace(case, features=frozenset({"sometimes"})))
    model.find_unused = False
    train_step(model.module.case, model, optimizer, 0)


def _mistake_frozen_later(case: Case) -> None:
    model, optimizer, _ = start(case)
    model.module.head.weight.requires_grad_(False)
    train_step(case, model, optimizer, 0)


def _mistake_order(case: Case) -> None:
    model, _, _ = start(case)
    model.module.blocks = nn.ModuleList(sorted(model.module.blocks, key=_by_rank))
    loss_on_rank(model, case).backward()
    model.finish_gradient_synchronization()


_turn = 0


def _by_rank(_: object) -> int:
    global _turn
    _turn += 1
    return _turn if dist.get_rank() == 0 else -_turn


def _mistake_clip(case: Case) -> None:
    model, _, _ = start(case)
    loss_on_rank(model, case).backward()
    model.clip_grad_norm(1.0)


def _mistake_nonfinite(case: Case) -> None:
    model, _, _ = start(replace(case, options={"check_finite": True}))
    loss = loss_on_rank(model, case)
    (loss * float("nan") if dist.get_rank() == 1 else loss).backward()
    try:
        model.finish_gradient_synchronization()
    finally:
        assert all(p.grad is None for p in model.parameters())
        assert model.num_skipped_steps == 1


def _mistake_nonfinite_norm(case: Case) -> None:
    model, _, _ = start(case)
    (loss_on_rank(model, case) * float("inf")).backward()
    model.finish_gradient_synchronization()
    model.clip_grad_norm(1.0, error_if_nonfinite=True)


def _mistake_changed(case: Case) -> None:
    model, _, _ = start(case)
    loss = loss_on_rank(model, case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    loss.backward()


def _embedding(**options: Any) -> nn.Embedding:
    return nn.Embedding(4, 2, device=communication_device(), **options)


MISTAKES: dict[str, Callable[[Case], object]] = {
    "missing": _mistake_missing,
    "frozen_later": _mistake_frozen_later,
    "order": _mistake_order,
    "clip": _mistake_clip,
    "nonfinite": _mistake_nonfinite,
    "nonfinite_norm": _mistake_nonfinite_norm,
    "changed": _mistake_changed,
    "twice": lambda case: wrap(start(case)[0].module, "fsdp"),
    "moved": lambda case: start(case)[0].to(torch.bfloat16),
    "assign": lambda case: start(case)[0].load_state_dict({}, assign=True),
    "whole": lambda case: start(case)[0].load_state_dict(initial_net(case).state_dict()),
    "names": lambda case: start(case)[0].load_full_state_dict({"x": torch.ones(1)}),
    "shape": lambda case: start(case)[0].load_full_state_dict(
        {**initial_net(case).state_dict(), "head.weight": torch.ones(2)}
    ),
    "sparse": lambda _: wrap(_embedding(sparse=True), "fsdp"),
    "max_norm": lambda _: wrap(_embedding(max_norm=1.0), "fsdp"),
    "compute_dtype": lambda case: start(replace(case, options={"compute_dtype": torch.int8})),
    "checkpoint_blocks": lambda case: start(replace(case, options={"checkpoint_blocks": -1})),
    "option": lambda case: start(replace(case, options={"shard": True})),
}
