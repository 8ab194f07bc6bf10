"""What a dataclass or NamedTuple says of its fields' types, held against their values: Python itself checks none. And how messages show both."""

import functools
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

SHOWN = 80  # characters of a wrong value
LISTED = 12  # names

_hints = functools.cache(get_type_hints)  # a table has hundreds of entries


def check_fields(instance: Any) -> None:
    """
    Raises:
        TypeError: a field's value is not of its annotated type; the message names the field, its value and what was expected.
        ValueError: it is of the type of a Literal's choices, and none of them; as above.
    """
    kind: Any = type(instance)
    for name, hint in _hints(kind).items():
        value = getattr(instance, name)
        if get_origin(hint) is Literal and type(value) in map(type, get_args(hint)) and not fits(value, hint):
            raise ValueError(f"{name}={shown(value)}: expected {spelt(hint)}")
        if not fits(value, hint):
            raise TypeError(f"{name}={shown(value)}: expected {spelt(hint)}, got {_kind(value, hint)}")


def _kind(value: Any, hint: Any) -> str:
    """What a value is instead; of a list where one may be, also what in it is wrong."""
    union = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    of = [get_args(one)[0] for one in union if get_origin(one) is list]
    wrong = [one for one in value if not fits(one, of[0])] if of and isinstance(value, list) else []
    return type(value).__name__ + (f" with {shown(wrong[0])}" if wrong else "")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type: no bool passes for a number, an int passes for a float, and what a list, tuple or dict holds counts.

    A list passes for a tuple: JSON knows no other.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(inner) and all(map(fits, value, inner))
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if hint is Any:
        return True
    if hint is int or hint is float:
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def is_finite(value: int | float) -> bool:
    """Whether a float holds the number; an int may be too large for one."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: Any) -> str:
    """A value as messages show it: on one line, of bounded length."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out integers of thousands of digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else text[:SHOWN] + " ..."


def gigabytes(size: int) -> str:
    """Bytes, for people: a GB is 10^9 of them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def listed(names: Sequence[str]) -> str:
    """Names as messages list them: not all of very many."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def lined_up(told: Mapping[str, str]) -> list[str]:
    """Lines for people, a name and what it is each."""
    width = max(map(len, told))
    return [f"{name:{width}}  {value}" for name, value in told.items()]


def spelt(hint: Any) -> str:
    """A type as messages name it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(spelt(one) for one in inner)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is list:
        return f"a list of {spelt(inner[0])}"
    if origin is tuple:
        return f"a list ({', '.join(spelt(one) for one in inner)})"
    return "None" if hint is types.NoneType else getattr(hint, "__name__", str(hint))
