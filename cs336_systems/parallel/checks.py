"""What must hold before any gradient is communicated, with one error text for all ranks.

Collectives that do not match end in a hang or an abort inside the backend, so everything that could
make them differ is compared once, when a module is wrapped.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_systems.errors import UsageError, bad
from cs336_systems.parallel.agreement import Difference, different
from cs336_systems.parallel.collectives import Group

_WHERE = "wrap"


def parameters_once(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's parameters by their first name; tied ones appear once."""
    return dict(module.named_parameters())


def buffers_once(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's buffers by their first name; shared ones appear once."""
    return dict(module.named_buffers())


def check_group(group: Group) -> None:
    """Check that there is a process group with this rank in it.

    Raises: UsageError.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise bad(_WHERE, "process group", "be initialised (init_process_group)", "none")
    if dist.get_rank(group) < 0:
        raise bad(_WHERE, "group", "contain this rank", f"rank {dist.get_rank()}")


def check_structure(
    module: nn.Module, strategy: str, options: Mapping[str, object], group: Group
) -> None:
    """Check that the module can be trained and is the same on every rank.

    Cost: one all-gather of 32 bytes per rank; the descriptions travel only if they differ.
    Raises: UsageError with the same text on every rank.
    """
    problem = _problem(module, group)
    reports = different([problem, *_describe(module, strategy, options, problem)], group)
    for rank, (found, *_) in enumerate(reports or ()):
        if found:
            raise UsageError(f"{_WHERE}: {found} on rank {rank}")
    if reports is not None:
        raise bad(_WHERE, "module", "be the same on every rank", Difference(reports))
    if problem:
        raise UsageError(f"{_WHERE}: {problem}")


def _problem(module: nn.Module, group: Group) -> str:
    """Return what makes the module unfit on this rank; empty when nothing does."""
    if not isinstance(module, nn.Module):
        return f"module must be a torch.nn.Module, got {type(module).__name__}"
    tensors = {**parameters_once(module), **buffers_once(module)}
    if lazy := [name for name, tensor in tensors.items() if nn.parameter.is_lazy(tensor)]:
        return f"module must be initialised, got lazy {lazy[0]!r}"
    parameters = parameters_once(module)
    if not parameters:
        return "module must have parameters, got none"
    if not any(parameter.requires_grad for parameter in parameters.values()):
        return f"module must have a trainable parameter, got {len(parameters)} frozen"
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(devices) > 1:
        return f"module must be on one device, got {' and '.join(devices)}"
    device_type = torch.device(devices[0]).type
    if f"{device_type}:" not in dist.get_backend_config(group):
        backend = dist.get_backend(group)
        return f"module must be on a device that {backend} serves, got {devices[0]}"
    return ""


def _describe(
    module: nn.Module, strategy: str, options: Mapping[str, object], problem: str
) -> list[str]:
    """Return lines that are equal where nothing makes collectives differ; none of what is unfit."""
    if problem:
        return []
    lines = [f"strategy {strategy}"]
    lines += [f"option {name}={value}" for name, value in sorted(options.items())]
    first_names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        what = f"tied to {first}" if first != name else _layout(parameter)
        lines.append(f"parameter {name} {what}")
    lines += [f"buffer {name} {_layout(buffer)}" for name, buffer in buffers_once(module).items()]
    return lines


def _layout(tensor: Tensor) -> str:
    """Describe what decides how the tensor and its gradient travel."""
    kind = "trainable" if tensor.requires_grad else "fixed"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{tuple(tensor.shape)} strides {tensor.stride()} {dtype} {kind}"
