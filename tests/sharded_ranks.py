"""What the ranks do in the tests of the sharded optimizer: each trains plain and sharded copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import adapters
import torch
import torch.distributed as dist
from cs336_basics.optimizer import AdamW
from torch import Tensor, nn

from cs336_systems.parallel import sharded_optimizer
from cs336_systems.parallel.collectives import communication_device, record_collectives
from cs336_systems.parallel.sharded_optimizer import ShardedOptimizer

NUM_STEPS = 5
_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
_DTYPES["complex"] = torch.complex64

# Those whose update of a parameter depends on that parameter alone.
OPTIMIZERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd_plain": (torch.optim.SGD, {"lr": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adam_foreach": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "foreach": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw_fused": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
    "basics_adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adamax": (torch.optim.Adamax, {}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "rprop": (torch.optim.Rprop, {}),
    "asgd": (torch.optim.ASGD, {}),
    "adafactor": (torch.optim.Adafactor, {}),
}
HYPERPARAMETERS: tuple[dict[str, Any], ...] = ({}, {"lr": 0.003}, {"weight_decay": 0.02})


@dataclass(frozen=True)
class Case:
    """One small training run, the same on every rank and wherever else it is repeated."""

    shapes: tuple[tuple[int, ...], ...]
    optimizer: str = "adamw"
    dtypes: tuple[str, ...] = ()
    """By parameter; fp32 beyond its end."""
    groups: tuple[int, ...] = ()
    """The parameter group of each parameter; 0 beyond its end."""
    without_gradient: frozenset[int] = frozenset()
    frozen: frozenset[int] = frozenset()
    scheduled: bool = False
    closure: bool = False
    overlap: bool = False
    num_late_groups: int = 0
    """How many of the last groups are added after two steps; schedules take no late groups."""
    seed: int = 0


@dataclass
class Run:
    """Parameters and the optimizer that trains them."""

    case: Case
    params: list[nn.Parameter]
    optimizer: Any
    late_groups: list[dict[str, Any]]
    scheduler: Any = None

    def step(self, number: int) -> Any:
        set_gradients(self.case, self.params, number)
        if number == 2:
            for group in self.late_groups:
                self.optimizer.add_param_group(group)
        result = None
        if self.case.closure:
            calls: list[int] = []
            result = self.optimizer.step(lambda: calls.append(number) or float(number))
            assert calls == [number]
        else:
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad()
        return result

    def values(self) -> list[Tensor]:
        return [param.detach().cpu().clone() for param in self.params]


def make_params(case: Case, device: torch.device) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(case.seed)
    params = []
    for index, shape in enumerate(case.shapes):
        dtype = _DTYPES[case.dtypes[index]] if index < len(case.dtypes) else torch.float32
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        params.append(nn.Parameter(values.to(device), requires_grad=index not in case.frozen))
    return params


def set_gradients(case: Case, params: Sequence[Tensor], number: int) -> None:
    generator = torch.Generator().manual_seed(1000 * (number + 1) + case.seed)
    for index, param in enumerate(params):
        values = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        if param.requires_grad and index not in case.without_gradient:
            param.grad = values.to(param.dtype).to(param.device)


def make_groups(case: Case, params: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    of_param = [*case.groups[: len(params)], *[0] * (len(params) - len(case.groups))]
    return [
        {"params": [p for p, g in zip(params, of_param, strict=True) if g == group], **options}
        for group, options in enumerate(HYPERPARAMETERS)
        if group in of_param
    ]


def make_run(case: Case, *, sharded: bool, device: torch.device | None = None) -> Run:
    params = make_params(case, communication_device() if device is None else device)
    groups = make_groups(case, params)
    num_first = max(1, len(groups) - (0 if case.scheduled else case.num_late_groups))
    optimizer_cls, kwargs = OPTIMIZERS[case.optimizer]
    optimizer: Any
    if sharded:
        overlap = {"overlap": True} if case.overlap else {}
        optimizer = ShardedOptimizer(groups[:num_first], optimizer_cls, **overlap, **kwargs)
    else:
        optimizer = optimizer_cls(groups[:num_first], **kwargs)
    run = Run(case, params, optimizer, groups[num_first:])
    if case.scheduled:
        run.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)
    return run


def train(run: Run, steps: range) -> list[list[Tensor]]:
    """Return the parameters after every step."""
    history = []
    for number in steps:
        assert run.step(number) == (float(number) if run.case.closure else None)
        if isinstance(run.optimizer, ShardedOptimizer):
            sent = any(param.numel() for param in run.optimizer.params)
            assert run.optimizer.pending == (run.case.overlap and sent)
            run.optimizer.wait()
        history.append(run.values())
    return history


def plain_and_sharded(case: Case) -> dict[str, Any]:
    """Train both ways and return the histories, with what this rank holds of the state."""
    plain, sharded = make_run(case, sharded=False), make_run(case, sharded=True)
    steps = range(NUM_STEPS)
    result = {"plain": train(plain, steps), "sharded": train(sharded, steps)}
    optimizer = sharded.optimizer
    # To look at a state, also where it is not kept, must not change what is saved.
    assert any(optimizer.state[param] for param in others(sharded)) is False
    optimizer.consolidate_state_dict(to=None)
    return {
        **result,
        "plain_state": to_cpu(plain.optimizer.state_dict()),
        "state": optimizer.state_dict(),
        "plain_bytes": state_bytes(plain.optimizer.state),
        "state_bytes": state_bytes(optimizer.state),
        "owners": [optimizer.owner_of[param] for param in optimizer.params],
        "has_inner": optimizer.inner is not None,
    }


def others(run: Run) -> list[Tensor]:
    """Return the parameters that this rank does not own."""
    owner_of = run.optimizer.owner_of
    return [param for param in run.params if owner_of[param] != dist.get_rank()]


def to_cpu(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, map_location="cpu")


def state_bytes(state: Any) -> int:
    tensors = (t for entry in state.values() for t in entry.values() if isinstance(t, Tensor))
    return sum(tensor.nbytes for tensor in tensors if tensor.ndim > 0)


def save_after(case: Case, num_steps: int, to: int | None) -> Any:
    """Train for a while and return the state dict, None on ranks that have none."""
    run = make_run(case, sharded=True)
    train(run, range(num_steps))
    run.optimizer.consolidate_state_dict(to=to)
    if to in (None, dist.get_rank()):
        return {"params": run.values(), "optimizer": run.optimizer.state_dict()}
    return None


def load_and_train(case: Case, saved: Any, steps: range, *, sharded: bool = True) -> Any:
    """Continue from what `save_after` gave."""
    run = make_run(replace(case, num_late_groups=0), sharded=sharded)
    with torch.no_grad():
        for param, value in zip(run.params, saved["params"], strict=True):
            param.copy_(value)
    run.optimizer.load_state_dict(saved["optimizer"])
    return train(run, steps)[-1]


def error_of(kind: str) -> tuple[str, str]:
    """Return the type and the text of the error that a use of `kind` raises on this rank."""
    try:
        _MISUSES[kind]()
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def _sharded(params: Any, **kwargs: Any) -> Any:
    options = {"lr": 0.1, "momentum": 0.9, **kwargs}
    return adapters.get_sharded_optimizer(params, torch.optim.SGD, **options)


def _weight(*shape: int, **kwargs: Any) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, device=communication_device(), **kwargs))


def _on_last_rank(there: Any, elsewhere: Any) -> Any:
    return there if dist.get_rank() == dist.get_world_size() - 1 else elsewhere


def _add_known() -> None:
    weight = _weight(3)
    _sharded([weight]).add_param_group({"params": [weight]})


def _add_twice() -> None:
    weight = _weight(3)
    _sharded([_weight(2)]).add_param_group({"params": [weight, weight]})


def _load(change: Callable[[dict[str, Any]], Any]) -> None:
    optimizer = _sharded([_weight(3), _weight(2)])
    plain = torch.optim.SGD([_weight(3), _weight(2)], lr=0.1)
    saved = plain.state_dict()
    optimizer.load_state_dict(change(saved) or saved)


def _twice() -> None:
    weight = _weight(3)
    _sharded([weight, weight])


def _twice_in_groups() -> None:
    weight = _weight(3)
    _sharded([{"params": [weight]}, {"params": [_weight(2), weight]}])


def _same_memory() -> None:
    weight = _weight(3)
    _sharded([weight, nn.Parameter(weight.detach())])


def _unconsolidated() -> None:
    _sharded([_weight(3)]).state_dict()


def _stale() -> None:
    weight = _weight(3)
    optimizer = _sharded([weight])
    optimizer.consolidate_state_dict(to=None)
    optimizer.state_dict()
    optimizer.step()
    optimizer.state_dict()


def _changed_dtype() -> None:
    module = nn.Linear(3, 2).to(communication_device())
    optimizer = _sharded(module.parameters())
    module.double()
    optimizer.step()


def _popped_group() -> None:
    optimizer = _sharded([{"params": [_weight(3)]}, {"params": [_weight(2)]}])
    optimizer.param_groups.pop()
    optimizer.step()


_MISUSES: dict[str, Callable[[], Any]] = {
    "empty": lambda: _sharded([]),
    "empty_group": lambda: _sharded([{"params": []}]),
    "tensor": lambda: _sharded(_weight(3)),
    "number": lambda: _sharded(3),
    "set": lambda: _sharded([{"params": {_weight(3)}}]),
    "strings": lambda: _sharded(["weight"]),
    "no_params": lambda: _sharded([{"lr": 0.1}]),
    "mixed_items": lambda: _sharded([{"params": [_weight(3)]}, _weight(2)]),
    "not_leaf": lambda: _sharded([_weight(3) * 2]),
    "sparse": lambda: _sharded([_weight(3).detach().to_sparse()]),
    "hyperparameter": lambda: _sharded([_weight(3)], lr=-1.0),
    "unknown_option": lambda: _sharded([_weight(3)], learning_rate=0.1),
    "twice": _twice,
    "twice_in_groups": _twice_in_groups,
    "same_memory": _same_memory,
    "add_known": _add_known,
    "add_twice": _add_twice,
    "add_list": lambda: _sharded([_weight(3)]).add_param_group([_weight(2)]),
    "load_list": lambda: _load(lambda saved: [saved]),
    "load_groups": lambda: _load(lambda saved: {**saved, "param_groups": []}),
    "load_sizes": lambda: _load(lambda saved: saved["param_groups"][0].update(params=[0])),
    "load_foreign": lambda: _load(lambda saved: saved["state"].update({7: {}})),
    "consolidate_to": lambda: _sharded([_weight(3)]).consolidate_state_dict(to=9),
    "unconsolidated": _unconsolidated,
    "stale": _stale,
    "changed_dtype": _changed_dtype,
    "popped_group": _popped_group,
    # From here on, only the last rank does it.
    "one_empty": lambda: _sharded(_on_last_rank([], [_weight(3)])),
    "one_hyperparameter": lambda: _sharded([_weight(3)], lr=_on_last_rank(-1.0, 0.1)),
    "one_shape": lambda: _sharded([_weight(2), _weight(_on_last_rank(4, 3))]),
    "one_dtype": lambda: _sharded([_weight(3, dtype=_on_last_rank(torch.half, torch.float))]),
    "one_more": lambda: _sharded([_weight(3)] * 1 + _on_last_rank([_weight(3)], [])),
    "one_key": lambda: _sharded([{"params": [_weight(3)], **_on_last_rank({"name": "a"}, {})}]),
    "one_adds": lambda: _sharded([_weight(3)]).add_param_group(
        {"params": [_weight(_on_last_rank(4, 3))]}
    ),
    "one_loads": lambda: _load(lambda saved: _on_last_rank({**saved, "param_groups": []}, saved)),
}


def usable_after_refused_group() -> list[int]:
    """Add groups that are refused, then one that is not, train, save and load, and return sizes."""
    first, second = _weight(3), _weight(2)
    optimizer = _sharded([first])
    refusals = 0
    for group in ([first], [_weight(_on_last_rank(4, 3))], [second]):
        try:
            optimizer.add_param_group({"params": group})
        except ValueError:
            refusals += 1
    assert refusals == 2
    for param in (first, second):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert bool((second != 1).all())
    optimizer.consolidate_state_dict(to=None)
    optimizer.load_state_dict(optimizer.state_dict())
    return [len(group["params"]) for group in optimizer.param_groups]


def collectives_of_steps(case: Case, *, chunk_bytes: int = 100 * 2**20) -> dict[str, Any]:
    """Return what two steps send, whether parameters stay where they are, and what they share."""
    with mock.patch.object(sharded_optimizer, "_OVERLAPPED_CHUNK_BYTES", chunk_bytes):
        run = make_run(case, sharded=True)
    places = [param.data_ptr() for param in run.params]
    with record_collectives() as log:
        train(run, range(2))
    return {
        "names": [entry.name for entry in log],
        "bytes": [entry.num_bytes for entry in log],
        "stay": places == [param.data_ptr() for param in run.params],
        "storages": len({param.untyped_storage().data_ptr() for param in run.params}),
        "aligned": all(place % 64 == 0 for place in places),
    }


def odd_memory(case: Case) -> bool:
    """Train parameters that cannot live in a buffer, and one that leaves it; tell if both agree."""
    runs = []
    for sharded in (False, True):
        params = make_params(case, communication_device())
        fused = torch.arange(24.0, device=params[0].device)
        params += [nn.Parameter(fused[:12].view(3, 4)), nn.Parameter(fused[12:])]
        params.append(nn.Parameter(torch.arange(6.0, device=fused.device).view(2, 3).t()))
        optimizer_cls, kwargs = OPTIMIZERS[case.optimizer]
        optimizer = (
            ShardedOptimizer(params, optimizer_cls, overlap=case.overlap, **kwargs)
            if sharded
            else optimizer_cls(params, **kwargs)
        )
        run = Run(case, params, optimizer, [])
        assert fused.data_ptr() == params[-3].data_ptr()
        assert params[-1].stride() == (1, 3)
        train(run, range(2))
        for param in params:
            param.data = param.detach().clone()
        train(run, range(2, 4))
        runs.append(run.values())
    return all(map(torch.equal, *runs))


def edits_and_hooks() -> dict[str, Any]:
    """Change hyperparameters by hand, count hooks, and read the groups."""
    params = [_weight(3), _weight(2)]
    optimizer = _sharded(params, lr=1.0, momentum=0.0)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.param_groups[0]["lr"] = 0.25
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)
    values = [float(param.detach()[0]) for param in params]
    return {"hooks": seen, "values": values, "is_optimizer": isinstance(optimizer, torch.optim.SGD)}


def on_a_part_of_the_ranks(case: Case, members: list[int]) -> tuple[bool, list[int]] | None:
    """Train on some ranks alone; tell if the result is the plain one, and who owns what."""
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        return None
    plain = make_run(case, sharded=False)
    params = make_params(case, communication_device())
    optimizer_cls, kwargs = OPTIMIZERS[case.optimizer]
    optimizer = ShardedOptimizer(make_groups(case, params), optimizer_cls, group, **kwargs)
    sharded = Run(case, params, optimizer, [])
    expected, got = train(plain, range(3))[-1], train(sharded, range(3))[-1]
    optimizer.consolidate_state_dict(to=1)
    assert (optimizer.rank == 1) == (optimizer._full_state is not None)
    return all(map(torch.equal, expected, got)), list(optimizer.owner_of.values())


def step_that_fails_on(rank: int) -> None:
    """Give one rank's own optimizer a closure-free step that it refuses."""
    optimizer = _sharded([_weight(3) for _ in range(4)])
    optimizer.step(**({"unknown": 1} if dist.get_rank() == rank else {}))


def version_after_step() -> int:
    """Return how often autograd thinks parameters changed that another rank owns, in one step."""
    params = [_weight(3) for _ in range(4)]
    optimizer = _sharded(params)
    others = [param for param in params if optimizer.owner_of[param] != dist.get_rank()]
    before = [param._version for param in others]
    optimizer.step()
    return min(param._version - old for param, old in zip(others, before, strict=True))


def against_torch_zero(case: Case) -> tuple[list[Tensor], list[Tensor], Any, Any]:
    """Train with torch's ZeroRedundancyOptimizer and ours."""
    from cs336_systems.parallel.peers_zero import ZeroRedundancyOptimizer

    optimizer_cls, kwargs = OPTIMIZERS[case.optimizer]
    params = make_params(case, communication_device())
    theirs = ZeroRedundancyOptimizer(
        make_groups(case, params), optimizer_class=optimizer_cls, **kwargs
    )
    their_run = Run(case, params, theirs, [])
    our_run = make_run(case, sharded=True)
    their_values = train(their_run, range(NUM_STEPS))[-1]
    our_values = train(our_run, range(NUM_STEPS))[-1]
    theirs.consolidate_state_dict(to=0)
    our_run.optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() != 0:
        return their_values, our_values, None, None
    return their_values, our_values, theirs.state_dict(), our_run.optimizer.state_dict()


def snapshot_survives_steps(case: Case) -> bool:
    """Tell whether a state dict still holds the values of its time after further steps."""
    run = make_run(case, sharded=True)
    train(run, range(2))
    run.optimizer.consolidate_state_dict(to=None)
    saved = run.optimizer.state_dict()
    before = copy.deepcopy(saved)
    train(run, range(2, 4))
    return str(saved) == str(before)
