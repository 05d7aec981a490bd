"""Every field of a config as an option `--section.field`, explained by the comment above it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from cs336_systems.errors import UsageError
from cs336_systems.train.config_data import comments_of, from_dict, to_dict

T = TypeVar("T")
# Fields that are set so often that they have a name without their section too.
SHORT_NAMES = {
    "training.attention_kernel": "attention_kernel",
    "training.ddp_wrapper": "ddp_wrapper",
    "checkpointing.checkpointing_interval": "checkpointing_interval",
}
_METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "A,B,...", dict: "JSON"}
_NULL = "null"


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, without the usage of a hundred options before it."""

    def __init__(self, **options: Any) -> None:
        # A cut-short name would change its meaning with the next field that is added.
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise the complaint, for `main` to print and exit with 2."""
        raise UsageError(f"{self.prog}: {message} (--help lists all options)")


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add an option for each field of a config class, grouped by section."""
    general = parser.add_argument_group("general", "Fields outside any section.")
    hints = get_type_hints(cls)
    for field in fields(cls):
        if is_dataclass(section := hints[field.name]):
            group = parser.add_argument_group(field.name, (section.__doc__ or "").splitlines()[0])
            _add_section(group, f"{field.name}.", section)
        else:
            _add_option(general, field.name, hints[field.name], _explained(cls, field))


def overridden(config: T, options: argparse.Namespace) -> T:
    """Return the config with the fields that were given on the command line.

    Raises: UsageError as when a config is read.
    """
    data = to_dict(config)
    for section, field, hint in _leaves(type(config)):
        text = getattr(options, f"{section}.{field}" if section else field, None)
        if text is not None:
            (data[section] if section else data)[field] = _value(hint, text)
    return from_dict(type(config), data)


def _leaves(cls: type) -> Iterator[tuple[str, str, Any]]:
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint):
            inner = get_type_hints(hint)
            yield from ((name, field.name, inner[field.name]) for field in fields(hint))
        else:
            yield "", name, hint


def _add_section(group: argparse._ArgumentGroup, prefix: str, section: Any) -> None:
    hints = get_type_hints(section)
    for field in fields(section):
        _add_option(group, prefix + field.name, hints[field.name], _explained(section, field))


def _add_option(group: argparse._ArgumentGroup, name: str, hint: Any, help_text: str) -> None:
    flags = [f"--{name}"]
    if name in SHORT_NAMES:
        flags.append(f"--{SHORT_NAMES[name]}")
    # Without a default: what was not given leaves the config as it was read.
    settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": help_text}
    if hint is bool:
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, **settings)
    else:
        group.add_argument(*flags, metavar=_METAVARS[_plain_type(hint)], **settings)


def _explained(cls: type, field: Field[Any]) -> str:
    factory = field.default_factory
    default = field.default if factory is MISSING else factory()
    shown = json.dumps(default) if not isinstance(default, str) else default
    return f"{comments_of(cls).get(field.name, '')} [{shown}]".strip().replace("%", "%%")


def _types(hint: Any) -> tuple[Any, ...]:
    is_whole = get_origin(hint) in (tuple, dict)
    return (hint,) if is_whole else get_args(hint) or (hint,)


def _plain_type(hint: Any) -> type:
    first = _types(hint)[0]
    return get_origin(first) or first


def _value(hint: Any, text: Any) -> object:
    """Return what the text says as JSON has it; a text that says nothing stays, to be refused."""
    if text == _NULL and type(None) in _types(hint):
        return None
    kind = _plain_type(hint)
    try:
        if kind in (int, float):
            return kind(text)
        if kind is dict:
            return json.loads(text)
        if kind is tuple:
            item = get_args(_types(hint)[0])[0]
            is_json = text.startswith("[")
            return json.loads(text) if is_json else [_value(item, part) for part in text.split(",")]
    except ValueError:
        pass
    return text
