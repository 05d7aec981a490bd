"""What ranks do in the tests of data parallelism; every function runs on all ranks at once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_systems.errors import UsageError
from cs336_systems.parallel import wrap
from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.collectives import (
    Collective,
    all_gather_object,
    communication_device,
    record_collectives,
)
from cs336_systems.parallel.report import NonFiniteGradientError

NUM_LAYERS = 4
WIDTH = 5


class PlannedError(Exception):
    """Raised by a test on purpose."""


class Tripwire(torch.autograd.Function):
    """The identity, whose backward pass raises."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor) -> Tensor:
        raise PlannedError


class Stack(nn.Module):
    """Layers by the names that are given, with switches for a single pass."""

    def __init__(self, num_layers: int = NUM_LAYERS, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        self.skipped: frozenset[int] = frozenset()
        self.raises_in_backward_of: int | None = None
        self.raises_in_forward = False

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number == self.raises_in_backward_of:
                x = Tripwire.apply(x)
            if number not in self.skipped:
                x = layer(x).tanh()
        if self.raises_in_forward:
            raise PlannedError
        return x.square().sum(1).mean()


def stack(seed: int = 0, **settings: int) -> Stack:
    torch.manual_seed(seed)
    return Stack(**settings).to(communication_device())


def inputs(step: int = 0, rank: int | None = None, width: int = WIDTH) -> Tensor:
    """Return a rank's own data."""
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(3, width, generator=generator).to(communication_device())


def bits(tensors: list[Tensor | None]) -> list[list[float] | None]:
    return [None if tensor is None else tensor.flatten().tolist() for tensor in tensors]


def grads_of(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def expected_average(net: Stack, step: int) -> list[Tensor | None]:
    """Return the sum of all ranks' gradients divided by their number, computed without wrapper."""
    total: list[Tensor | None] = [None for _ in net.parameters()]
    for rank in range(dist.get_world_size()):
        grads = torch.autograd.grad(net(inputs(step, rank)), list(net.parameters()))
        total = [g if t is None else t + g for t, g in zip(total, grads, strict=True)]
    return [None if t is None else t / dist.get_world_size() for t in total]


def run_step(model: DataParallel, step: int = 0) -> None:
    for p in model.parameters():
        p.grad = None
    model(inputs(step)).backward()
    model.finish_gradient_synchronization()


def traffic_of_steps(strategy: str, num_steps: int, **options: Any) -> list[list[Collective]]:
    """Return what each step sends."""
    model = wrap(stack(), strategy, **options)
    steps = []
    for step in range(num_steps):
        with record_collectives() as log:
            run_step(model, step)
        steps.append(log)
    return steps


def traffic_of_wrapping(strategy: str) -> list[Collective]:
    net = stack()
    net.layers[1].weight = net.layers[0].weight
    with record_collectives() as log:
        wrap(net, strategy)
    return log


def reductions_before_the_first_layer(strategy: str, **options: Any) -> tuple[int, int]:
    """Return how many reductions were under way when the gradient of the first parameter of the
    model, the last of the backward pass, had just been computed; and how many there are at all."""
    net = stack()
    counts = []
    # Registered before the wrapper's, so that it runs before it.
    net.layers[0].weight.register_post_accumulate_grad_hook(lambda _: counts.append(len(log)))
    net.layers[0].bias.register_post_accumulate_grad_hook(lambda _: counts.append(len(log)))
    model = wrap(net, strategy, **options)
    with record_collectives() as log:
        run_step(model)
    return min(counts), len(log)


def reductions_under_no_sync(strategy: str, num_micro_batches: int) -> dict[str, list[int]]:
    """Return how many collectives there were after each micro-batch and after finishing."""
    net = stack()
    model = wrap(net, strategy)
    counts: dict[str, list[int]] = {"during": [], "finished": []}
    for step in range(2):
        net.zero_grad()
        if step:
            # The order of the launches is agreed on once, at the second step's first forward.
            model(inputs())
        with record_collectives() as log:
            for micro in range(num_micro_batches):
                last = micro == num_micro_batches - 1
                with contextlib.nullcontext() if last else model.no_sync():
                    model(inputs(micro)).backward()
                counts["during"].append(len(log))
            model.finish_gradient_synchronization()
        counts["finished"].append(len(log))
    return counts


def accumulate_with_faults(strategy: str) -> dict[str, Any]:
    """Nest no_sync, leave it by an exception, and see that the gradients are still averages."""
    net = stack()
    model = wrap(net, strategy)
    with record_collectives() as log:
        with model.no_sync():
            with model.no_sync():
                model(inputs(0)).backward()
            # The inner one has not switched synchronization on.
            model(inputs(1)).backward()
        silent = len(log)
    with contextlib.suppress(PlannedError), model.no_sync():
        raise PlannedError
    model(inputs(2)).backward()
    model.finish_gradient_synchronization()
    parts = [expected_average(net, step) for step in range(3)]
    wanted = [sum(tensors[1:], tensors[0]) for tensors in zip(*parts, strict=True)]
    return {"silent": silent, "got": grads_of(net), "wanted": wanted}


def usage_error(strategy: str, misuse: str) -> str:
    model = wrap(stack(), strategy)
    try:
        if misuse == "finish_in_no_sync":
            with model.no_sync():
                model.finish_gradient_synchronization()
        if misuse == "clip_before_finish":
            model(inputs()).backward()
            model.clip_grad_norm(1.0)
        if misuse == "backward_twice":
            loss = model(inputs())
            loss.backward(retain_graph=True)
            loss.backward()
    except UsageError as error:
        return str(error)
    return "no error"


def leave_unused(
    strategy: str, find_unused: bool, skipping_ranks: tuple[int, ...]
) -> tuple[str, list[Any], list[Any]]:
    """Skip a layer on some ranks; returns the error, the gradients, and what they should be."""
    net = stack()
    model = wrap(net, strategy, find_unused=find_unused)
    run_step(model, 1)
    net.skipped = frozenset([2]) if dist.get_rank() in skipping_ranks else frozenset()
    message = ""
    try:
        run_step(model, 0)
        if dist.get_backend() == "nccl" and not find_unused:
            model.finish_gradient_synchronization()
    except UsageError as error:
        message = str(error)
    got = bits(grads_of(net))
    plain = stack()
    total = [torch.zeros_like(p) for p in plain.parameters()]
    for rank in range(dist.get_world_size()):
        plain.zero_grad()
        plain.skipped = frozenset([2]) if rank in skipping_ranks else frozenset()
        plain(inputs(0, rank)).backward()
        for t, p in zip(total, plain.parameters(), strict=True):
            t += 0 if p.grad is None else p.grad
    # The wrapper is usable afterwards.
    net.skipped = frozenset()
    run_step(model, 3)
    assert all(
        torch.equal(g, w) for g, w in zip(grads_of(net), expected_average(net, 3), strict=True)
    )
    return message, got, bits([t / dist.get_world_size() for t in total])


def nonfinite_step(strategy: str, bad_ranks: tuple[int, ...], value: float) -> dict[str, Any]:
    """Train three steps, the second with a bad gradient on some ranks."""
    net = stack()
    model = wrap(net, strategy, check_finite=True)
    optimizer = model.build_optimizer(torch.optim.SGD, lr=0.1)
    run_step(model)
    optimizer.step()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    loss = model(inputs(1))
    (loss * value if dist.get_rank() in bad_ranks else loss).backward()
    ranks, message = None, ""
    try:
        model.finish_gradient_synchronization()
    except NonFiniteGradientError as error:
        ranks, message = error.ranks, str(error)
    num_grads = sum(p.grad is not None for p in net.parameters())
    optimizer.step()
    changed = [not torch.equal(b, p) for b, p in zip(before, net.parameters(), strict=True)]
    run_step(model, 2)
    optimizer.step()
    return {
        "ranks": ranks,
        "message": message,
        "num_grads": num_grads,
        "changed": any(changed),
        "num_skipped_steps": model.num_skipped_steps,
        "state": bits(list(net.parameters())),
    }


def wrap_unequal(strategy: str, difference: str, odd_rank: int) -> str:
    """Wrap a model that is another one on one rank; returns the error."""
    options: dict[str, Any] = {}
    net: Any = stack()
    if dist.get_rank() == odd_rank:
        net, options = _altered(net, difference)
    try:
        wrap(net, options.pop("strategy", strategy), **options)
    except UsageError as error:
        return str(error)
    return "no error"


def _altered(net: Stack, difference: str) -> tuple[Any, dict[str, Any]]:
    first = net.layers[0]
    device = first.weight.device
    if difference == "count":
        return stack(num_layers=NUM_LAYERS + 1), {}
    if difference == "shape":
        net.layers[1] = nn.Linear(WIDTH, WIDTH + 1, device=device)
    if difference == "dtype":
        net.layers[1].double()
    if difference == "order":
        weight = first.weight
        del first.weight
        first.register_parameter("weight", weight)
    if difference == "frozen":
        first.bias.requires_grad_(False)
    if difference == "strides":
        first.weight = nn.Parameter(first.weight.detach().t().contiguous().t())
    if difference == "tied":
        net.layers[1].weight = first.weight
    if difference == "buffer":
        net.register_buffer("extra", torch.zeros(1, device=device))
    if difference == "empty":
        return nn.Module(), {}
    if difference == "all frozen":
        net.requires_grad_(False)
    if difference == "option":
        return net, {"find_unused": True}
    if difference == "strategy":
        return net, {"strategy": "none"}
    if difference == "no module":
        return "net", {}
    return net, {}


def wrap_unfit(kind: str) -> str:
    """Wrap on all ranks what cannot be; returns the error."""
    net: Any = stack()
    options: dict[str, Any] = {}
    strategy = "flashddp"
    if kind == "lazy":
        net = nn.LazyLinear(3)
    elif kind == "two devices":
        net.register_buffer("elsewhere", torch.zeros(1, device="meta"))
    elif kind == "meta":
        net = net.to("meta")
    elif kind in ("0", "-1", "nan"):
        options["bucket_size_mb"] = float(kind)
    elif kind == "in place":
        options["in_place_mb"] = -1
    elif kind == "torch 0":
        strategy, options["bucket_size_mb"] = "torch_ddp", 0
    elif kind == "integers":
        options["communication_dtype"] = torch.int32
    elif kind == "torch integers":
        strategy, options["communication_dtype"] = "torch_ddp", torch.float64
    elif kind == "torch finite":
        strategy, options["check_finite"] = "torch_ddp", True
    elif kind == "option":
        options["bucket_mb"] = 3
    elif kind == "strategy":
        strategy = "ddp"
    else:
        net, _ = _altered(net, kind)
    try:
        wrap(net, strategy, **options)
    except UsageError as error:
        return str(error)
    return "no error"


def wrap_for_others(strategy: str) -> str:
    """Wrap on every rank for a group in which only the last two are; the average is theirs."""
    size = dist.get_world_size()
    members = [size - 2, size - 1]
    group = dist.new_group(members)
    net = stack(seed=dist.get_rank())
    try:
        model = wrap(net, strategy, group=group)
    except UsageError as error:
        return str(error)
    first = stack(seed=members[0])
    assert bits(list(net.parameters())) == bits(list(first.parameters()))
    run_step(model)
    a, b = (
        torch.autograd.grad(first(inputs(0, rank)), list(first.parameters())) for rank in members
    )
    for got, x, y in zip(grads_of(net), a, b, strict=True):
        assert torch.equal(got, (x + y) / 2)
    return "averaged over two"


def refreeze(strategy: str, odd_ranks: tuple[int, ...], thaw: bool) -> str:
    """Freeze (or thaw) a parameter after the wrap on some ranks; returns the next error."""
    net = stack()
    net.layers[1].bias.requires_grad_(not thaw)
    model = wrap(net, strategy, find_unused=True)
    run_step(model)
    if dist.get_rank() in odd_ranks:
        net.layers[1].bias.requires_grad_(thaw)
    try:
        run_step(model, 1)
    except UsageError as error:
        return str(error)
    return "no error"


def fail_midway(strategy: str, where: str, failing_ranks: tuple[int, ...]) -> tuple[list, list]:
    """Raise in a pass of some ranks, then train on; returns the gradients and the wanted ones."""
    net = stack()
    model = wrap(net, strategy, find_unused=True)
    for step in range(4):
        fails = step % 2 == 0 and dist.get_rank() in failing_ranks
        net.raises_in_forward = fails and where == "forward"
        net.raises_in_backward_of = 2 if fails and where == "backward" else None
        if fails:
            try:
                run_step(model, step)
            except PlannedError:
                continue
            raise AssertionError("the pass should have raised")
        run_step(model, step)
    return bits(grads_of(net)), bits(expected_average(net, 3))


def unfinished_backward(strategy: str) -> tuple[list, list]:
    """Run two synchronised backward passes before gradients are cleared, finish the second."""
    net = stack()
    model = wrap(net, strategy)
    model(inputs(0)).backward()
    model(inputs(1)).backward()
    model.finish_gradient_synchronization()
    first, second = expected_average(net, 0), expected_average(net, 1)
    return grads_of(net), [a + b for a, b in zip(first, second, strict=True)]


class Branches(nn.Module):
    """Two branches whose gradients appear in an order that differs from rank to rank."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.a, self.b) if dist.get_rank() % 2 else (self.b, self.a)
        return sum((branch(x).sin() for branch in branches), x.cos()).sum()


def disagree_on_order(strategy: str, **options: Any) -> dict[str, Any]:
    """Train a model whose ranks see their gradients in different orders."""
    torch.manual_seed(0)
    net = Branches().to(communication_device())
    seen: list[str] = []
    names = {parameter: name for name, parameter in net.named_parameters()}
    for parameter in names:
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(names[p]))
    model = wrap(net, strategy, **options)
    logs, equal = [], []
    for step in range(3):
        with record_collectives() as log:
            run_step(model, step)
        logs.append([(entry.name, entry.numel) for entry in log])
        grads = all_gather_object([p.grad.cpu() for p in net.parameters()])
        equal.append(all(torch.equal(a, b) for a, b in zip(*grads[:2], strict=True)))
    return {"seen": seen, "logs": logs, "equal": equal}


def first_launches(strategy: str, **options: Any) -> tuple[list[int], list[int]]:
    """Return the sizes of the reductions of a first and a third step, for a model whose parameters
    are used in the order in which they are defined backwards."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh()).sum()

    model = wrap(Backwards().to(communication_device()), strategy, **options)
    sizes = []
    for _ in range(3):
        for p in model.parameters():
            p.grad = None
        with record_collectives() as log:
            model(inputs()[:, :3]).backward()
            sizes.append([entry.numel for entry in log if entry.name == "all_reduce"])
        model.finish_gradient_synchronization()
    return sizes[0], sizes[2]


def where_gradients_are(bucket_size_mb: float | None, set_to_none: bool) -> list[bool]:
    """Tell of every parameter and step whether its gradient lies inside a bucket's memory."""
    net = stack()
    net.layers[1].weight = nn.Parameter(net.layers[1].weight.detach().t())
    model = wrap(net, "flashddp", bucket_size_mb=bucket_size_mb)
    inside = []
    for step in range(3):
        net.zero_grad(set_to_none=set_to_none)
        with model.no_sync():
            model(inputs(step)).backward()
            inside += _inside(model)
        model(inputs(step)).backward()
        model.finish_gradient_synchronization()
        inside += _inside(model)
        inside += [p.grad.stride() == p.stride() for p in net.parameters()]
    return inside


def _inside(model: Any) -> list[bool]:
    spans = [(b.flat.data_ptr(), b.flat.data_ptr() + b.flat.nbytes) for b in model._buckets]
    return [
        any(
            low <= p.grad.data_ptr() and p.grad.data_ptr() + p.grad.nbytes <= high
            for low, high in spans
        )
        for p in model.parameters()
    ]


def foreign_gradients(strategy: str) -> tuple[list, list]:
    """Put gradients of the caller's own in place: other strides, other memory, none."""
    net = stack()
    model = wrap(net, strategy, find_unused=True)
    run_step(model)
    rank = dist.get_rank()
    parameters = list(net.parameters())
    generator = torch.Generator().manual_seed(rank)
    for number, p in enumerate(parameters):
        values = torch.randn(p.shape, generator=generator).to(p.device)
        p.grad = None if number == 3 else values.t().contiguous().t() if number % 2 == 0 else values
    local = [None if p.grad is None else p.grad.cpu() for p in parameters]
    model.finish_gradient_synchronization()
    every = all_gather_object(local)
    wanted = [
        None if tensors[0] is None else sum(tensors[1:], tensors[0]) / len(every)
        for tensors in zip(*every, strict=True)
    ]
    return bits(grads_of(net)), bits(wanted)


def reduced_precision(strategy: str, seed: int) -> tuple[list[Tensor], list[list[Tensor]], list]:
    """Return averages that travelled in bf16, every rank's gradients in fp32, and the traffic."""
    net = stack(seed)
    model = wrap(net, strategy, communication_dtype=torch.bfloat16)
    with record_collectives() as log:
        run_step(model, seed)
    reduced = [(entry.dtype, entry.num_bytes) for entry in log]
    every = [
        list(torch.autograd.grad(net(inputs(seed, rank)), list(net.parameters())))
        for rank in range(dist.get_world_size())
    ]
    return [p.grad for p in net.parameters()], every, reduced


class Statistics(nn.Module):
    """A batch norm, and buffers that are no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("table", torch.rand(WIDTH), persistent=False)
        self.register_buffer("expanded", torch.rand(1, WIDTH).expand(3, WIDTH))
        self.register_buffer("flags", torch.rand(3) > 0.5)
        self.register_buffer("gapped", torch.rand(6)[::2])

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(x) * self.table + self.expanded).sum()


def buffers_over_steps(strategy: str, broadcast_buffers: bool) -> dict[str, Any]:
    """Return the buffers when wrapped and the running mean as each step's forward found it."""
    torch.manual_seed(dist.get_rank())
    net = Statistics().to(communication_device())
    model = wrap(net, strategy, broadcast_buffers=broadcast_buffers)
    wrapped = {name: buffer.clone().tolist() for name, buffer in net.named_buffers()}
    found = []
    net.norm.register_forward_pre_hook(lambda *_: found.append(net.norm.running_mean.tolist()))
    counts = []
    for step in range(3):
        with record_collectives() as log, model.no_sync():
            model(inputs(step))
            first = len(log)
            model(inputs(step))
        counts.append((first, len(log)))
        run_step(model, step)
    with torch.no_grad():
        model(inputs())
    return {"wrapped": wrapped, "found": found[::3], "counts": counts}


def wrap_again(strategy: str) -> int:
    """Drop a wrapper, wrap its module again, and count what a step sends."""
    net = stack()
    run_step(wrap(net, strategy))
    gc.collect()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in net.parameters())
    model = wrap(net, strategy)
    with record_collectives() as log:
        run_step(model)
    return len(log)


def move_state(strategy: str) -> bool:
    """Move states between the wrapper and the plain module, strictly, both ways."""
    net, plain = stack(1), stack(2)
    model = wrap(net, strategy)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    there = bits(list(plain.parameters())) == bits(list(net.parameters()))
    other = stack(3)
    model.load_state_dict(other.state_dict())
    back = bits(list(net.parameters())) == bits(list(other.parameters()))
    full = model.full_state_dict()
    return there and back and all(torch.equal(full[k], v) for k, v in other.state_dict().items())


def train_with_groups(strategy: str) -> tuple[list, list]:
    """Train with parameter groups and a schedule, and alone on all data in the same way."""
    net, plain = stack(), stack()
    model = wrap(net, strategy)
    results = []
    for subject, trained in ((net, model), (plain, None)):
        groups = [
            {"params": [p for p in subject.parameters() if p.dim() == 1], "weight_decay": 0.0},
            {"params": [p for p in subject.parameters() if p.dim() > 1], "lr": 0.2},
        ]
        settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
        if trained is not None:
            optimizer = trained.build_optimizer(torch.optim.SGD, groups, **settings)
        else:
            optimizer = torch.optim.SGD(groups, **settings)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
        for step in range(4):
            if trained is not None:
                run_step(trained, step)
            else:
                for p, grad in zip(plain.parameters(), expected_average(plain, step), strict=True):
                    p.grad = grad
            optimizer.step()
            schedule.step()
        results.append(bits(list(subject.parameters())))
    return results[0], results[1]


def sparse_gradient(strategy: str) -> str:
    net = nn.Embedding(4, 3, sparse=True, device=communication_device())
    model = wrap(net, strategy)
    try:
        model(torch.tensor([1, 2], device=net.weight.device)).sum().backward()
        model.finish_gradient_synchronization()
    except UsageError as error:
        return str(error)
    return "no error"


def train_by_hooks(
    get: Callable[..., Any], args: tuple, start: Callable | None, after: Callable
) -> tuple[list, list]:
    """Train as the course's tests do, through the hooks of tests/adapters.py."""
    net, plain = stack(dist.get_rank()), stack(0)
    model = get(net, *args)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alone = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        if start is not None:
            start(model, optimizer)
        model(inputs(step)).backward()
        after(model, optimizer)
        optimizer.step()
        for p, grad in zip(plain.parameters(), expected_average(plain, step), strict=True):
            p.grad = grad
        alone.step()
    assert model.module is net
    return bits(list(net.parameters())), bits(list(plain.parameters()))


def wide_buckets(bucket_size_mb: float) -> list[int]:
    """Return the sizes of a step's buckets, for twenty layers of a fraction of a MiB."""
    model = wrap(stack(num_layers=20, width=409), "flashddp", bucket_size_mb=bucket_size_mb)
    with record_collectives() as log:
        model(inputs(width=409)).backward()
        model.finish_gradient_synchronization()
    return [entry.numel for entry in log if entry.dtype is torch.float32]


def report_read_late(strategy: str) -> list[str]:
    """Leave a parameter unused in the second of four steps, reading reports as on a GPU."""
    net = stack()
    model = wrap(net, strategy)
    model._reads_late = True
    messages = []
    for step in range(4):
        net.skipped = frozenset([2]) if step == 1 and dist.get_rank() == 0 else frozenset()
        try:
            run_step(model, step)
            messages.append("")
        except UsageError as error:
            messages.append(str(error))
    return messages
