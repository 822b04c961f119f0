"""Spec strings: a part is named as `name`, `name:value` or `name:key=value,key=value`, in Python, TOML and the command line."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from ralm.errors import UsageError, unknown


@dataclass(frozen=True)
class Spec:
    """`every:4` -> Spec("every", (4,), {}); `ensemble:k=4,weights=prior` -> Spec("ensemble", (), {"k": 4, "weights": "prior"})."""

    name: str
    args: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [str(a) for a in self.args] + [f"{k}={v}" for k, v in self.options.items()]
        return self.name + (":" + ",".join(parts) if parts else "")


def _value(text: str) -> Any:
    """Numbers, true/false/none become themselves; everything else stays text."""
    low = text.lower()
    if low in ("true", "false"):
        return low == "true"
    if low == "none":
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, int | float) else text


def whole(least: int, /, **values: Any) -> None:
    """Raise UsageError unless every named value is a whole number (not 2.5, not true) of at least `least`."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise UsageError(f"{name}={value} is no whole number of at least {least}; use {name}={max(least, 1)} or more")


def real(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def parse(text: str) -> Spec:
    """Parse a spec string. Raises UsageError where it is empty, repeats a key, or has a nameless option."""
    name, _, rest = text.strip().partition(":")
    if not name:
        raise UsageError(f"empty name in spec '{text}': write name or name:key=value,...")
    args, options = [], {}
    for part in rest.split(",") if rest else []:
        key, eq, value = part.partition("=")
        if not eq:
            if options:
                raise UsageError(f"in spec '{text}', the bare value '{part}' comes after a key=value: bare values go first")
            args.append(_value(part))
        elif not key.strip():
            raise UsageError(f"in spec '{text}', '{part}' has no key: write key=value")
        elif key.strip() in options:
            raise UsageError(f"in spec '{text}', the key '{key.strip()}' is given twice")
        else:
            options[key.strip()] = _value(value)
    return Spec(name.strip(), tuple(args), options)


def make(kind: str, text: str, table: dict[str, Any]) -> Any:
    """Build the part a spec names from a table of constructors; wrong options are one clear line, not a TypeError.

    Raises UsageError for an unknown name, an unknown option (with the known ones), or a value the part refuses."""
    import inspect

    spec = parse(text)
    if spec.name not in table:
        raise unknown(kind, spec.name, table)
    factory = table[spec.name]
    parameters = {n: p for n, p in inspect.signature(factory).parameters.items() if p.kind is not p.VAR_KEYWORD}
    for key in spec.options:
        if key not in parameters:
            raise unknown(f"option of {kind} '{spec.name}'", key, parameters)
    if len(spec.args) > len(parameters):
        raise UsageError(f"{kind} '{spec.name}' takes at most {len(parameters)} values ({', '.join(parameters)}), "
                         f"'{text}' gives {len(spec.args)}")
    try:
        return factory(*spec.args, **spec.options)
    except (TypeError, ValueError) as e:
        raise UsageError(f"{kind} '{text}': {e}") from e
