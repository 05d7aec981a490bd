"""What each strategy holds on a rank, on paper: parameters, gradients, optimizer state, and what it
needs to communicate.

Alignment of single tensors (16 bytes in a bucket, 256 in what ZeRO sends) and counters are left
out, as is the step's report of a few bytes a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cs336_systems.accounting import parameters
from cs336_systems.config import ModelConfig
from cs336_systems.errors import bad, unknown

FP32_BYTES = 4
NUM_MOMENTS = 2
"""AdamW keeps two numbers a weight, in the masters' dtype."""
PENDING_BYTES = 25 * 2**20
"""Gradients that wait outside their bucket to be copied in together: at most so many."""
EXCHANGE_BYTES = 128 * 2**20
"""Through which gradients travel by copy engines, unless all of them take less."""
GATHERED_UNITS = 4
"""Units of FSDP that are whole at a time: in use, two ahead, and the last of the forward pass."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the strategies need to know of a model, in numbers of weights."""

    total: int
    replicated: int
    """Those that FSDP leaves whole on every rank: all but linear and embedding layers."""
    largest_unit: int
    """The most that FSDP gathers at once: a block, the embedding or the head."""

    @classmethod
    def of(cls, config: ModelConfig) -> Weights:
        """Return those of a language model."""
        found = parameters(config)
        block = found.blocks // config.num_layers
        return cls(
            total=found.total,
            replicated=found.norms,
            largest_unit=max(block, found.embedding, found.head),
        )


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """Bytes on one rank; the first four are there between steps, activations are not in it."""

    parameters: float
    gradients: float
    optimizer_state: float
    communication: float = 0.0
    """What stays beside them: gradients in another dtype, memory that peers write to."""
    transient: float = 0.0
    """Copies that come and go within a step: the most of them at once."""

    @property
    def held(self) -> float:
        """Return what is there between steps, gradients included."""
        return self.parameters + self.gradients + self.optimizer_state + self.communication


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a model is trained in.

    Raises: UsageError for sizes below 1.
    """

    weights: Weights
    world_size: int
    master_bytes: int = FP32_BYTES
    """Of one number of the parameters, the gradients and the optimizer's state."""
    communication_bytes: int | None = None
    """Of one number of a gradient as it travels; None is the masters' (FSDP: what it computes
    in)."""
    compute_bytes: int | None = None
    """Of one number of the weights that FSDP gathers; None is the masters'."""

    def __post_init__(self) -> None:
        sizes = ("world_size", "master_bytes", "communication_bytes", "compute_bytes")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise bad("rank_bytes", name, "be at least 1", value)

    @property
    def whole(self) -> float:
        """All weights once, in the masters' dtype."""
        return float(self.weights.total * self.master_bytes)

    @property
    def cast(self) -> float:
        """All gradients in the dtype they travel in, if that is another one."""
        wire = self.communication_bytes or self.master_bytes
        return float(self.weights.total * wire) if wire != self.master_bytes else 0.0


def _replicated(
    setting: Setting, *, communication: float = 0.0, transient: float = 0.0
) -> RankBytes:
    """Everything on every rank."""
    return RankBytes(
        parameters=setting.whole,
        gradients=setting.whole,
        optimizer_state=NUM_MOMENTS * setting.whole,
        communication=communication,
        transient=transient,
    )


def _one_by_one(setting: Setting) -> RankBytes:
    """Gradients travel where they lie; casts of all of them are alive together."""
    return _replicated(setting, transient=setting.cast)


def _flat(setting: Setting) -> RankBytes:
    """All gradients one after the other, and once more if they travel in another dtype."""
    return _replicated(setting, transient=setting.whole + setting.cast)


def _bucketed(setting: Setting) -> RankBytes:
    """Buckets are the gradients; they keep a second memory for another dtype."""
    pending = min(float(PENDING_BYTES), setting.whole)
    return _replicated(setting, communication=setting.cast, transient=pending)


def _copy_engines(setting: Setting) -> RankBytes:
    """As bucketed, and the memory that ranks write into each other's, where there are several."""
    whole = _bucketed(setting)
    exchanged = min(float(EXCHANGE_BYTES), setting.cast or setting.whole)
    return replace(whole, communication=whole.communication + exchanged * (setting.world_size > 1))


def _zero1(setting: Setting) -> RankBytes:
    """As bucketed, but each rank has the state of the parameters it owns, 1/n of them on average.

    Parameters are sent from where they are. A rank may own more than the mean by one parameter.
    """
    whole = _bucketed(setting)
    return replace(whole, optimizer_state=whole.optimizer_state / setting.world_size)


def _fsdp(setting: Setting) -> RankBytes:
    """Shards of everything, and within a step whole units: gathered weights, and the gradients of
    one as they appear, as they travel and, in another dtype, as they arrive."""
    weights, num_ranks = setting.weights, setting.world_size
    sharded, unit = weights.total - weights.replicated, weights.largest_unit
    kept = (sharded / num_ranks + weights.replicated) * setting.master_bytes
    compute = setting.compute_bytes or setting.master_bytes
    wire = setting.communication_bytes or compute
    arriving = wire / num_ranks if wire != setting.master_bytes else 0.0
    gathered = min(GATHERED_UNITS * unit, sharded) * compute
    return RankBytes(
        parameters=kept,
        gradients=kept,
        optimizer_state=NUM_MOMENTS * kept,
        transient=gathered + unit * (compute + wire + arriving),
    )


_STRATEGIES: dict[str, Callable[[Setting], RankBytes]] = {
    "none": _replicated,
    "naive": _one_by_one,
    "flat": _flat,
    "overlapped": _one_by_one,
    "flashddp": _bucketed,
    "flashddp_ce": _copy_engines,
    "zero1": _zero1,
    "fsdp": _fsdp,
}
MODELLED = tuple(_STRATEGIES)


def rank_bytes(strategy: str, setting: Setting) -> RankBytes:
    """Return what a rank holds that trains with AdamW by a row of `parallel.STRATEGIES`.

    Raises: UsageError for a strategy that is not among `MODELLED`.
    """
    if strategy not in _STRATEGIES:
        raise unknown("rank_bytes", "strategy", MODELLED, strategy)
    return _STRATEGIES[strategy](setting)
