"""What the ranks do in the tests of the zero1 strategy."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from cs336_basics.model import BasicsTransformerLM
from cs336_basics.optimizer import AdamW
from torch import Tensor, nn

from cs336_systems.parallel import collectives, parameter_broadcast, sharded_optimizer, wrap
from cs336_systems.parallel.collectives import communication_device, record_collectives

# Adam divides by the size of a gradient: what is zero but for rounding (that of an attention's key
# bias, say) would become a step of any size, and clipping would not show. A large eps stops both.
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-4}),
    "basics_adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-4}),
}
WIDTH = 8


class Tied(nn.Module):
    """The head's weight is the embedding's, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, 16, bias=False)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Reader(nn.Module):
    """Reads the parameters of modules that it never calls, and has one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"never_called": nn.Linear(WIDTH, WIDTH)})
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.inner["never_called"].weight)
        x = x + self.inner["never_called"].bias * self.scale
        return self.attention(x[None], x[None], x[None], need_weights=False)[0][0]


class Normed(nn.Module):
    """Computes a weight from parameters before its forward, and keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(torch.relu(self.linear(x)))


def _mlp() -> nn.Module:
    sizes = [WIDTH, 24, 16, WIDTH]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def _compiled_block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), torch.compile(_mlp(), backend="eager"))


def _compiled_in_place() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), _mlp())
    model[1].compile(backend="eager")
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp,
    "tied": Tied,
    "reader": Reader,
    "normed": Normed,
    "compiled_block": _compiled_block,
    "compiled_in_place": _compiled_in_place,
}


@dataclass(frozen=True)
class Case:
    """One training run on a batch that is divided among ranks and micro-batches."""

    model: str = "mlp"
    optimizer: str = "adamw"
    strategy: str = "zero1"
    num_steps: int = 5
    num_micro_batches: int = 1
    max_norm: float | None = None
    scheduled: bool = False
    bucket_size_mb: float | None = 25
    dtype: torch.dtype = torch.float64
    compile_whole: bool = False
    compile_after: int | None = None
    """The step after which the model's last layer is compiled in place."""
    overlap: bool = True
    lazy: bool = False
    """Parameters arrive when they are waited for and not a moment before."""
    seed: int = 0


def make_model(case: Case, device: torch.device) -> nn.Module:
    torch.manual_seed(case.seed)
    return MODELS[case.model]().to(device=device, dtype=case.dtype)


def batch(case: Case, step: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + case.seed + 1)
    # Divides evenly among up to 3 ranks with up to 3 micro-batches each.
    return torch.randn(36, WIDTH, generator=generator, dtype=torch.float64).to(device, case.dtype)


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return model(x).square().mean()


def single(case: Case, num_parts: int) -> tuple[dict[str, Tensor], list[float]]:
    """Train on all parts of every batch in one process; returns state and norms of gradients."""
    device = torch.device("cpu")
    model = make_model(case, device)
    optimizer_cls, kwargs = OPTIMIZERS[case.optimizer]
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_cls(params, **kwargs)
    scheduler = _scheduler(optimizer) if case.scheduled else None
    norms = []
    for step in range(case.num_steps):
        for part in batch(case, step, device).chunk(num_parts):
            (loss_of(model, part) / num_parts).backward()
        if case.max_norm is not None:
            norms.append(float(nn.utils.clip_grad_norm_(params, case.max_norm)))
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, norms


def train(case: Case) -> dict[str, Any]:
    """Train with a strategy; returns state right after the last step, and norms of gradients."""
    with late_delivery() if case.lazy else contextlib.nullcontext():
        return _train(case)


def _train(case: Case) -> dict[str, Any]:
    device = communication_device()
    options: dict[str, Any] = {"bucket_size_mb": case.bucket_size_mb}
    if case.strategy == "zero1":
        options["overlap"] = case.overlap
    wrapper = wrap(make_model(case, device), case.strategy, **options)
    optimizer_cls, kwargs = OPTIMIZERS[case.optimizer]
    optimizer = wrapper.build_optimizer(optimizer_cls, **kwargs)
    scheduler = _scheduler(optimizer) if case.scheduled else None
    if case.compile_whole:
        torch._dynamo.reset()
    model = torch.compile(wrapper.module, backend="eager") if case.compile_whole else None
    norms, stale = [], 0
    for step in range(case.num_steps):
        mine = batch(case, step, device).chunk(dist.get_world_size())[dist.get_rank()]
        *first, last = mine.chunk(case.num_micro_batches)
        call = _through(wrapper, model)
        with wrapper.no_sync():
            for part in first:
                (loss_of(call, part) / case.num_micro_batches).backward()
        (loss_of(call, last) / case.num_micro_batches).backward()
        wrapper.finish_gradient_synchronization()
        if case.max_norm is not None:
            norms.append(float(wrapper.clip_grad_norm(case.max_norm)))
        optimizer.step()
        stale += int(getattr(optimizer, "pending", False))
        if step == case.compile_after:
            wrapper.module[-1].compile(backend="eager")
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    state = {name: value.cpu().clone() for name, value in wrapper.full_state_dict().items()}
    return {
        "state": state,
        "norms": norms,
        "pending_steps": stale,
        "optimizer": type(optimizer).__name__,
    }


def _through(wrapper: Any, compiled: Any) -> Callable[[Tensor], Tensor]:
    if compiled is None:
        return wrapper

    def call(x: Tensor) -> Tensor:
        wrapper._start_forward()
        return compiled(x)

    return call


def _scheduler(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)


class _Late:
    """A message that travels when it is waited for."""

    def __init__(self, tensor: Tensor, group: Any, source: int) -> None:
        self.args = (tensor, group, source)

    def wait(self) -> None:
        tensor, group, source = self.args
        collectives.broadcast(tensor, group, source=source)


@contextlib.contextmanager
def late_delivery() -> Iterator[None]:
    """Make reading a parameter too early visible, always, and not only when the network is slow.

    Ranks run the same program, so that they wait in the same order.
    """

    def send(tensor: Tensor, group: Any, *, source: int, async_op: bool) -> _Late:
        assert async_op
        return _Late(tensor, group, source)

    with mock.patch.object(parameter_broadcast, "broadcast", send), one_message_per_parameter():
        yield


def one_message_per_parameter() -> Any:
    """Have no parameter arrive with another one that was waited for."""
    return mock.patch.object(sharded_optimizer, "_OVERLAPPED_CHUNK_BYTES", 1)


def _stepped() -> tuple[Any, Any]:
    """Return a wrapper and its optimizer just after a step."""
    case = Case()
    wrapper = wrap(make_model(case, communication_device()), "zero1")
    optimizer = wrapper.build_optimizer(torch.optim.SGD, lr=0.1)
    loss_of(wrapper, batch(case, 0, communication_device())).backward()
    wrapper.finish_gradient_synchronization()
    optimizer.step()
    return wrapper, optimizer


def _values(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def accesses_after_step(kind: str) -> dict[str, Any]:
    """Read parameters in one way just after a step; tell if they were right then."""
    with late_delivery():
        wrapper, optimizer = _stepped()
        early = _values(wrapper.module)
        if kind == "state_dict":
            got = list(wrapper.state_dict().values())
        elif kind == "full_state_dict":
            got = list(wrapper.full_state_dict().values())
        elif kind == "module_state_dict":
            got = list(wrapper.module.state_dict().values())
        elif kind == "part_state_dict":
            got = list(wrapper.module[0].state_dict().values())
        elif kind == "parameters":
            got = [parameter.detach() for parameter in wrapper.parameters()]
        elif kind == "deepcopy":
            copied = copy.deepcopy(wrapper.module)
            got = _values(copied)
            loss_of(copied, torch.ones(2, WIDTH, dtype=torch.float64))
        elif kind == "pickle":
            buffer = io.BytesIO()
            torch.save(wrapper.module, buffer)
            buffer.seek(0)
            loaded = torch.load(buffer, weights_only=False)
            got = _values(loaded)
            loss_of(loaded, torch.ones(2, WIDTH, dtype=torch.float64))
        elif kind == "thrown_away":
            del optimizer
            gc.collect()
            loss_of(wrapper.module, torch.ones(2, WIDTH, dtype=torch.float64))
            got, optimizer = _values(wrapper.module), None
        elif kind == "second_optimizer":
            wrapper.build_optimizer(torch.optim.SGD, lr=0.1)
            got = _values(wrapper.module)
        else:
            optimizer.wait()
            got = _values(wrapper.module)
        got = [value.clone() for value in got]
        if optimizer is not None:
            optimizer.wait()
        right = _values(wrapper.module)[: len(got)]
    return {
        "was_early": not all(map(torch.equal, early, _values(wrapper.module))),
        "is_right": all(map(torch.equal, got, right)),
    }


def load_after_step() -> bool:
    """Load other values just after a step; tell if nothing that was under way came on top."""
    with late_delivery():
        wrapper, optimizer = _stepped()
        values = {name: torch.full_like(v, 3) for name, v in wrapper.module.state_dict().items()}
        wrapper, optimizer = _stepped()
        wrapper.load_state_dict(values)
        optimizer.wait()
        return all(bool((value == 3).all()) for value in wrapper.state_dict().values())


def layers_waited_for() -> list[int]:
    """Return how many parameters are still on their way as each layer begins."""
    case = Case()
    with one_message_per_parameter():
        wrapper = wrap(make_model(case, communication_device()), "zero1")
        optimizer = wrapper.build_optimizer(torch.optim.SGD, lr=0.1)
    counts: list[int] = []
    for layer in wrapper.module:
        layer.register_forward_pre_hook(lambda *_: counts.append(len(optimizer.broadcast._pending)))
    for step in range(2):
        counts.clear()
        loss_of(wrapper, batch(case, step, communication_device())).backward()
        wrapper.finish_gradient_synchronization()
        optimizer.step()
    counts.clear()
    loss_of(wrapper, batch(case, 2, communication_device()))
    return counts


def collectives_of_step(strategy: str) -> list[str]:
    """Return the names of what one step in the middle of training sends."""
    case = Case(strategy=strategy)
    wrapper = wrap(make_model(case, communication_device()), strategy)
    optimizer = wrapper.build_optimizer(torch.optim.SGD, lr=0.1)
    for step in range(4):
        with record_collectives() as log:
            loss_of(wrapper, batch(case, step, communication_device())).backward()
            wrapper.finish_gradient_synchronization()
            optimizer.step()
    return [entry.name for entry in log]


def train_language_model(strategy: str, num_steps: int) -> dict[str, Any]:
    """Train the course's model a little; returns its parameters and the bytes of state."""
    device = communication_device()
    torch.manual_seed(0)
    model = BasicsTransformerLM(
        vocab_size=64, context_length=16, d_model=32, num_layers=3, num_heads=4, d_ff=64
    ).to(device)
    wrapper = wrap(model, strategy)
    optimizer = wrapper.build_optimizer(AdamW, lr=1e-2)
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        tokens = torch.randint(64, (4, 17), generator=generator).to(device)
        logits = wrapper(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        wrapper.finish_gradient_synchronization()
        wrapper.clip_grad_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()
    state = {name: value.cpu().clone() for name, value in wrapper.full_state_dict().items()}
    tensors = [t for entry in optimizer.state.values() for t in entry.values()]
    return {
        "state": state,
        "state_bytes": sum(t.nbytes for t in tensors if isinstance(t, Tensor) and t.ndim > 0),
    }
