"""Config dataclasses from and to plain data, with one line for whatever does not fit."""

from __future__ import annotations

import inspect
import json
import math
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from cs336_systems.errors import UsageError, bad, unknown

T = TypeVar("T")
_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "text",
    dict: "a mapping of options",
    type(None): "null",
}


def from_dict(cls: type[T], data: object, where: str = "config") -> T:
    """Make `cls` of what JSON holds; `where` is its name in errors.

    Raises: UsageError for fields that are unknown, missing or of another type, naming them.
    """
    if not isinstance(data, Mapping):
        raise bad(where, "section", "be a mapping of fields", data)
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            raise unknown(where, "field", known, name)
    values = {}
    for name, value in data.items():
        hint = hints[name]
        values[name] = (
            from_dict(hint, value, name)
            if isinstance(hint, type) and is_dataclass(hint)
            else _read(where, name, hint, value)
        )
    try:
        return cls(**values)
    except TypeError as error:
        raise UsageError(f"{where}: {_missing(cls, values) or error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Return the config as JSON would give it back."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def read_config(cls: type[T], path: Path) -> T:
    """Read a config from a JSON file.

    Raises: UsageError for a file that cannot be read or is no JSON, and as `from_dict`.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"config: {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"config: {path} must be JSON: {error}") from error
    return from_dict(cls, data)


def check_types(where: str, config: object) -> None:
    """Check every field of a dataclass against its annotation.

    Raises: UsageError naming the first that does not fit.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _fits(hint, value):
            raise bad(where, name, f"be {_describe(hint)}", value)


def comments_of(cls: type) -> dict[str, str]:
    """Return the comment above each field of a dataclass, for programs that explain themselves."""
    return dict(_commented(inspect.getsource(cls).splitlines()))


def _commented(lines: list[str]) -> Iterator[tuple[str, str]]:
    comment: list[str] = []
    for line in map(str.strip, lines):
        if line.startswith("#"):
            comment.append(line.lstrip("# "))
            continue
        if (match := re.match(r"(\w+): ", line)) and comment:
            yield match[1], " ".join(comment)
        comment = []


def _read(where: str, name: str, hint: Any, value: object) -> object:
    """Return the value as the field holds it: JSON has lists where a config has tuples."""
    if isinstance(value, list) and any(get_origin(each) is tuple for each in _choices(hint)):
        value = tuple(value)
    if not _fits(hint, value):
        raise bad(where, name, f"be {_describe(hint)}", value)
    return value


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _missing(cls: Any, values: Mapping[str, object]) -> str:
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.default is parameter.empty and name not in values:
            return f"{name} must be given"
    return ""


def _choices(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one there is."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(hint: Any, value: object) -> bool:
    return any(_fits_one(each, value) for each in _choices(hint))


def _fits_one(hint: Any, value: object) -> bool:
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and _fits_tuple(get_args(hint), value)
    if (get_origin(hint) or hint) is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if hint is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value)  # type: ignore[arg-type]
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _fits_tuple(items: tuple[Any, ...], value: tuple[object, ...]) -> bool:
    if len(items) == 2 and items[1] is Ellipsis:
        return all(_fits(items[0], item) for item in value)
    return len(items) == len(value) and all(map(_fits, items, value))


def _describe(hint: Any) -> str:
    return " or ".join(_describe_one(each) for each in _choices(hint))


def _describe_one(hint: Any) -> str:
    if get_origin(hint) is tuple:
        items = get_args(hint)
        many = "a list of" if items[-1] is Ellipsis else f"a list of {len(items)}:"
        return f"{many} {_describe(items[0]).removeprefix('a ').removeprefix('an ')}"
    return _NAMES.get(get_origin(hint) or hint, f"a {getattr(hint, '__name__', hint)}")
