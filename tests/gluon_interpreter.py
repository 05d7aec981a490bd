"""An interpreter for the Hopper kernels: Gluon has none, and its mistakes are races and deadlocks.

A kernel's source is run as Python, with torch's tensors for its registers. Each partition of a
program is a task; only one runs at a time, and at every operation that others can notice the next
one is drawn at random. What the hardware does on its own is done at random moments as well, as late
as it may be: loads and stores of the accelerator, and products that are in flight, which read
shared memory when they run and not when they are asked for. So a slot that is given back or
overwritten too early gives a wrong result for some seed, and a wait for what never comes is found
at once. Raised as errors: shared memory that the accelerator or a product reads without a fence,
barriers that are not initialised or arrived at too often, and results used while in flight.

Not modelled: the threads of a warpgroup (so a missing barrier within one is not found), layouts,
and the limits of registers and shared memory, which the compiler knows.
"""

from __future__ import annotations

import functools
import importlib.util
import random
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_HERE = "cs336_systems.attention."
_SHARED_MODULES = (
    "hopper_common",
    "hopper_softmax",
    "hopper_gradients",
    "hopper_backward",
)
"""In the order in which they need each other."""


class InterpreterError(Exception):
    """The kernel did what the hardware would not forgive."""


# --- who runs when ---


@dataclass(eq=False)
class Task:
    """One partition of a program."""

    name: str
    num_threads: int
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    is_ready: Callable[[], bool] = lambda: True
    waits_for: str = "nothing"
    is_done: bool = False
    error: BaseException | None = None
    products: deque[Callable[[], None]] = field(default_factory=deque)
    """In flight, in order."""
    stores: list[bool] = field(default_factory=list)
    """Of the accelerator, in order: which are done."""
    unfenced: list[Tensor] = field(default_factory=list)
    """Marks of shared memory that it has written and that only threads can see."""


class Machine:
    """Runs the tasks of a program and what they set going."""

    def __init__(self, seed: int, program: int, num_programs: int) -> None:
        self.random = random.Random(seed)
        # 1: the hardware does nothing before somebody waits for it.
        self.lateness = self.random.choice([0.3, 0.8, 0.95, 1.0])
        # What of the hardware comes after all else of it, if anything.
        self.latest = self.random.choice(["arrive", "leave", "product", None])
        self.program, self.num_programs = torch.tensor(program), num_programs
        self.back = threading.Semaphore(0)
        self.tasks: list[Task] = []
        self.events: list[Callable[[], None]] = []
        self.current: Task | None = None
        self.named: dict[int, list[int]] = {}
        """Of each named barrier, how many threads have arrived and how often all had."""

    def run(self, bodies: Sequence[tuple[str, int, Callable[[], None]]]) -> None:
        """Run bodies, each with its name and number of threads, side by side to their end."""
        self.tasks = [Task(name, num_threads) for name, num_threads, _ in bodies]
        threads = [
            threading.Thread(target=self._start, args=(task, body), daemon=True)
            for task, (*_, body) in zip(self.tasks, bodies, strict=True)
        ]
        for thread in threads:
            thread.start()
        while not all(task.is_done for task in self.tasks):
            self._step()
        while self.events or any(task.products for task in self.tasks):
            self._step()

    def _start(self, task: Task, body: Callable[[], None]) -> None:
        task.go.acquire()
        try:
            body()
        except BaseException as error:
            task.error = error
        task.is_done = True
        self.back.release()

    def _step(self) -> None:
        ready = [task for task in self.tasks if not task.is_done and task.is_ready()]
        working = [task for task in self.tasks if task.products]
        hardware = [*self.events, *((task,) for task in working)]
        sooner = [each for each in hardware if self._kind_of(each) != self.latest]
        late = bool(ready) and self.random.random() < self.lateness
        choices: list[Any] = ready if late else sooner or hardware or ready
        if not choices:
            waits = "; ".join(f"{t.name}: {t.waits_for}" for t in self.tasks if not t.is_done)
            raise InterpreterError(f"nothing can go on: {waits}")
        chosen = self.random.choice(choices)
        if isinstance(chosen, Task):
            self.current = chosen
            chosen.go.release()
            self.back.acquire()
            self.current = None
            if chosen.error is not None:
                raise chosen.error
        elif isinstance(chosen, tuple):
            chosen[0].products.popleft()()
        else:
            self.events.remove(chosen)
            chosen()

    @staticmethod
    def _kind_of(hardware: Any) -> str:
        return "product" if isinstance(hardware, tuple) else hardware.__name__

    @property
    def task(self) -> Task:
        assert self.current is not None
        return self.current

    def switch(self, is_ready: Callable[[], bool] = lambda: True, what: str = "its turn") -> None:
        """Let others go on; come back when it is ready."""
        task = self.task
        task.is_ready, task.waits_for = is_ready, what
        self.back.release()
        task.go.acquire()


_machine: Machine | None = None


def machine() -> Machine:
    assert _machine is not None
    return _machine


# --- memory ---


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count = 0
        self.num_arrived, self.num_bytes, self.parity = 0, 0, 0

    def update(self, arrived: int = 0, num_bytes: int = 0) -> None:
        if not self.count:
            raise InterpreterError("a barrier was used before it was initialised")
        self.num_arrived += arrived
        self.num_bytes += num_bytes
        if self.num_arrived > self.count:
            raise InterpreterError(f"a barrier of {self.count} was arrived at once more")
        if self.num_arrived == self.count and self.num_bytes == 0:
            self.num_arrived, self.parity = 0, self.parity ^ 1


class Barriers(list[Barrier]):
    def index(self, at: Any) -> Barrier:  # type: ignore[override]
        return self[int(at)]


@dataclass
class Shared:
    """A view of shared memory, and of marks where the last write was by a thread and unfenced."""

    data: Tensor
    marks: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def _view(self, view: Callable[[Tensor], Tensor]) -> Shared:
        return Shared(view(self.data), view(self.marks))

    def index(self, at: Any) -> Shared:
        return self._view(lambda tensor: tensor[int(at)])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return self._view(lambda tensor: tensor.view(list(shape)))

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return self._view(lambda tensor: tensor.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return self._view(lambda tensor: tensor.permute(*order))

    def store(self, value: Tensor) -> None:
        machine().switch()
        assert value.shape == self.data.shape, (value.shape, self.data.shape)
        assert value.dtype == self.data.dtype, (value.dtype, self.data.dtype)
        self.data.copy_(value)
        self.marks.fill_(True)
        machine().task.unfenced.append(self.marks)

    def load(self, _layout: Any) -> Tensor:
        """As threads do, for which no fence is needed."""
        machine().switch()
        return self.data.clone()

    def read(self) -> Tensor:
        """As products and the accelerator do."""
        if self.marks.any():
            raise InterpreterError("shared memory was read behind a write without a fence")
        return self.data.clone()

    def receive(self, value: Tensor) -> None:
        self.data.copy_(value.view(self.data.shape))
        self.marks.fill_(False)


def _allocate(dtype: Any, shape: Sequence[int], _layout: Any) -> Any:
    if dtype is torch.int64:
        return Barriers(Barrier() for _ in range(shape[0]))
    data = torch.full(list(shape), float("nan"), dtype=dtype)
    return Shared(data, torch.zeros(list(shape), dtype=torch.bool))


class Descriptor:
    """A host descriptor as the kernel sees it."""

    def __init__(self, host: Any) -> None:
        self.base, self.block_shape = host.base, list(host.block_shape)
        self.tensor = host.base.as_strided(list(host.shape), list(host.strides))
        self.dtype, self.layout = host.base.dtype, host.layout
        num_bytes = torch.Size(self.block_shape).numel() * self.dtype.itemsize
        self.block_type = SimpleNamespace(nbytes=num_bytes)

    def inside(self, at: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return where the part of a block that exists is in the tensor and in the block."""
        tensor_part, block_part = [], []
        for start, size, block in zip(
            map(int, at), self.tensor.shape, self.block_shape, strict=True
        ):
            first, last = max(start, 0), min(start + block, size)
            last = max(first, last)
            tensor_part.append(slice(first, last))
            block_part.append(slice(first - start, last - start))
        return tuple(tensor_part), tuple(block_part)

    def load(self, at: Sequence[Any]) -> Tensor:
        block = torch.zeros(self.block_shape, dtype=self.dtype)
        source, target = self.inside(at)
        block[target] = self.tensor[source]
        return block


@dataclass
class Pointer:
    """Into a tensor, seen as the run of memory that it is."""

    tensor: Tensor
    offset: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + more)


def _load(pointer: Pointer) -> Tensor:
    return pointer.tensor.view(-1)[pointer.offset].clone()


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    pointer.tensor.view(-1)[pointer.offset[mask]] = value[mask]


# --- what kernels import ---


class InFlight:
    """A product's result before it was waited for."""

    def __init__(self) -> None:
        self.value: Tensor | None = None


def _operand(source: Any) -> Tensor:
    return (source.read() if isinstance(source, Shared) else source).float()


def _product(
    a: Any, b: Any, acc: Any, *, use_acc: bool = True, is_async: bool = False
) -> Any:  # fmt: skip
    machine().switch()
    result = InFlight()

    def multiply() -> None:
        before = acc.value if isinstance(acc, InFlight) else acc
        product = _operand(a) @ _operand(b)
        assert product.shape == before.shape, (product.shape, before.shape)
        result.value = product + before if use_acc else product

    machine().task.products.append(multiply)
    return result if is_async else _wait_for_products(0, (result,))


def _wait_for_products(num_outstanding: int, deps: Sequence[Any]) -> Any:
    task = machine().task
    machine().switch(lambda: len(task.products) <= num_outstanding, "its products")
    for result in deps:
        if isinstance(result, InFlight) and result.value is None:
            raise InterpreterError("a product was taken to be done that may be in flight")
    values = tuple(r.value if isinstance(r, InFlight) else r for r in deps)
    return values[0] if len(values) == 1 else values


def _fence() -> None:
    if machine().current is None:  # before the partitions begin
        return
    for marks in machine().task.unfenced:
        marks.fill_(False)
    machine().task.unfenced.clear()


def _wait(barrier: Barrier, parity: Any) -> None:
    if not barrier.count:
        raise InterpreterError("a barrier was waited for before it was initialised")
    machine().switch(lambda: barrier.parity != int(parity), f"parity {int(parity)} of a barrier")


def _arrive(barrier: Barrier) -> None:
    machine().switch()
    barrier.update(arrived=1)


def _expect(barrier: Barrier, num_bytes: int, pred: Any = True) -> None:
    machine().switch()
    if pred:
        barrier.update(arrived=1, num_bytes=num_bytes)


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = count


def _copy_in(
    descriptor: Descriptor, at: Sequence[Any], barrier: Barrier, target: Shared, pred: Any = True
) -> None:
    machine().switch()
    if not pred:
        return
    # Whoever still reads it would do so during the copy.
    target.receive(torch.full_like(target.data, float("nan")))
    at = [int(each) for each in at]

    def arrive() -> None:
        target.receive(descriptor.load(at))
        barrier.update(num_bytes=-descriptor.block_type.nbytes)

    machine().events.append(arrive)


def _copy_out(descriptor: Descriptor, at: Sequence[Any], source: Shared, add: bool = False) -> None:
    machine().switch()
    task, at = machine().task, [int(each) for each in at]
    number = len(task.stores)
    task.stores.append(False)

    def leave() -> None:
        target, part = descriptor.inside(at)
        value = source.read().view(descriptor.block_shape)[part]
        descriptor.tensor[target] = descriptor.tensor[target] + value if add else value
        task.stores[number] = True

    machine().events.append(leave)


def _wait_for_stores(num_outstanding: int) -> None:
    task = machine().task
    older = range(len(task.stores) - num_outstanding)  # they may end in any order
    machine().switch(lambda: all(task.stores[each] for each in older), "its stores")


def _assembly(text: str, _: str, operands: Sequence[Any], **__: Any) -> None:
    if text.startswith("prefetch"):
        return
    found = re.match(r"bar\.(sync|arrive) (\$1|\d+), (\d+);", text)
    assert found is not None, text
    number, expected = int(operands[0] if operands else found[2]), int(found[3])
    state = machine().named.setdefault(number, [0, 0])
    machine().switch()
    state[0] += machine().task.num_threads
    generation = state[1]
    if state[0] > expected:
        raise InterpreterError(f"named barrier {number}: {state[0]} arrived of {expected}")
    if state[0] == expected:
        state[0], state[1] = 0, generation + 1
    elif found[1] == "sync":
        machine().switch(lambda: state[1] > generation, f"named barrier {number}")


def _specialize(
    partitions: Sequence[tuple[Any, Sequence[Any]]], num_warps: Sequence[int], _: Any
) -> None:
    warps = [4, *num_warps]  # the first's is an option of the launch
    machine().run(
        [
            (f"{number} {function.__name__}", 32 * warps[number], lambda f=function, a=args: f(*a))  # type: ignore[misc]
            for number, (function, args) in enumerate(partitions)
        ]
    )


def _either(choose: Callable[[Tensor, Tensor], Tensor], plain: Callable[..., Any]) -> Any:
    def function(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return choose(torch.as_tensor(a), torch.as_tensor(b))
        return plain(a, b)

    return function


def _where(condition: Tensor, one: Any, other: Any) -> Tensor:
    return torch.where(condition, one, other)


def _language() -> ModuleType:
    language = ModuleType("triton.experimental.gluon.language")
    layouts = dict.fromkeys(
        (
            "NVMMADistributedLayout",
            "DistributedLinearLayout",
            "SliceLayout",
            "DotOperandLayout",
        ),
        lambda *_, **__: None,
    )
    shared_layout = SimpleNamespace(get_default_for=lambda *_, **__: None)
    functions: dict[str, Any] = {
        **layouts,
        "NVMMASharedLayout": shared_layout,
        "constexpr": lambda value: value,
        "static_range": range,
        "program_id": lambda _: machine().program,
        "num_programs": lambda _: machine().num_programs,
        "cdiv": lambda a, b: (a + b - 1) // b,
        "minimum": _either(torch.minimum, min),
        "maximum": _either(torch.maximum, max),
        "arange": lambda start, stop, _layout=None: torch.arange(start, stop),
        "zeros": lambda shape, dtype, _layout=None: torch.zeros(shape, dtype=dtype),
        "where": _where,
        "max": lambda x, axis: x.amax(axis),
        "min": lambda x, axis: x.amin(axis),
        "reduce": lambda x, axis, combine: functools.reduce(combine, x.unbind(axis)),
        "sum": lambda x, axis: x.sum(axis),
        "exp2": torch.exp2,
        "log2": torch.log2,
        "convert_layout": lambda x, _layout, **_: x,
        "load": _load,
        "store": _store,
        "allocate_shared_memory": _allocate,
        "thread_barrier": lambda: None,
        "inline_asm_elementwise": _assembly,
        "warp_specialize": _specialize,
    }
    for name, value in functions.items():
        setattr(language, name, value)
    for dtype in ("float32", "float16", "bfloat16", "int32", "int64"):
        setattr(language, dtype, getattr(torch, dtype))
    return language


def _static_assert(condition: bool) -> None:
    assert condition


def _modules() -> dict[str, ModuleType]:
    """Return stand-ins for what kernels import."""
    language = _language()
    language.static_assert = _static_assert  # type: ignore[attr-defined]
    gluon = ModuleType("triton.experimental.gluon")
    gluon.jit = lambda function=None, **_: function or (lambda inner: inner)  # type: ignore[attr-defined]
    gluon.language = language  # type: ignore[attr-defined]
    experimental = ModuleType("triton.experimental")
    experimental.gluon = gluon  # type: ignore[attr-defined]
    triton = ModuleType("triton")
    triton.constexpr_function = lambda function: function  # type: ignore[attr-defined]
    hopper = ModuleType("triton.experimental.gluon.language.nvidia.hopper")
    layout = SimpleNamespace
    hopper.mbarrier = SimpleNamespace(  # type: ignore[attr-defined]
        init=_init, expect=_expect, wait=_wait, arrive=_arrive, MBarrierLayout=layout
    )
    hopper.tma = SimpleNamespace(  # type: ignore[attr-defined]
        async_copy_global_to_shared=_copy_in,
        async_copy_shared_to_global=_copy_out,
        store_wait=_wait_for_stores,
    )
    hopper.fence_async_shared = _fence  # type: ignore[attr-defined]
    hopper.warpgroup_mma = _product  # type: ignore[attr-defined]
    hopper.warpgroup_mma_wait = _wait_for_products  # type: ignore[attr-defined]
    core = ModuleType("triton.experimental.gluon.language._core")
    core.builtin = lambda function: function  # type: ignore[attr-defined]
    libtriton = ModuleType("triton._C.libtriton")
    libtriton.ir = SimpleNamespace()  # type: ignore[attr-defined]
    named = (triton, experimental, gluon, language, core, hopper, libtriton)
    return {module.__name__: module for module in named}


Change = tuple[str, str]
"""What is to stand for what in a kernel's source: a mistake, planted to be found."""


def _source(name: str) -> tuple[ModuleSpec, str]:
    """Return where a module is, and its source."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return spec, Path(spec.origin).read_text()


def _run_source(name: str, change: Change | None) -> ModuleType:
    """Run a module's source anew, with the stand-ins and the modules that are there."""
    spec, source = _source(name)
    if change is not None:
        source = source.replace(*change)
    module = importlib.util.module_from_spec(spec)
    exec(compile(source, spec.origin or name, "exec"), module.__dict__)
    _stand_in(module)
    return module


@functools.cache
def _interpreted(name: str, change: Change | None) -> ModuleType:
    shared = [_HERE + each for each in _SHARED_MODULES]
    # No AssertionError, for which a planted mistake would be taken that was never planted.
    if change is not None and not any(change[0] in _source(each)[1] for each in (*shared, name)):
        raise LookupError(f"{name} has nothing to change: {change[0]}")
    with mock.patch.dict(sys.modules, _modules()):
        for each in shared:
            sys.modules[each] = _run_source(each, change)
        return _run_source(name, change)


def _stand_in(module: ModuleType) -> None:
    for replaced, function in _OF_THE_COMPILER.items():
        setattr(module, replaced, function)


# What the kernels make from the compiler's own names or in assembly, and what asks for a layout.
_OF_THE_COMPILER: dict[str, Callable[..., Any]] = {
    "reduce_add": lambda descriptor, at, source: _copy_out(descriptor, at, source, add=True),
    "rescale": lambda sums, alpha: sums * alpha[:, None],
    "times": lambda sums, alpha, _: sums * alpha,
    "as_integers": lambda x: x.view(torch.int32),
    "as_floats": lambda bits: bits.view(torch.float32),
}


def interpret(launch: Any, seed: int, change: Change | None = None) -> None:
    """Run all programs of a launch on the CPU's tensors, in an order drawn from `seed`.

    Raises: InterpreterError.
    """
    global _machine
    kernel = launch.kernel.fn
    function = getattr(_interpreted(kernel.__module__, change), kernel.__name__)
    arguments = {name: _argument(value) for name, value in launch.arguments.items()}
    order = list(range(launch.num_programs))
    random.Random(seed).shuffle(order)
    for program in order:
        _machine = Machine(seed + program, program, launch.num_programs)
        function(**arguments)
    _machine = None


def _argument(value: Any) -> Any:
    if hasattr(value, "block_shape"):
        return Descriptor(value)
    return Pointer(value) if isinstance(value, Tensor) else value
