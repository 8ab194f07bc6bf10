"""JSON and YAML that strangers wrote: a value of bounded size and depth, or one ValueError that says what is wrong."""

import json
import re
from collections.abc import Hashable
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

LARGEST = 1 << 24  # bytes of a file that is read at all
DEEPEST = 32  # lists and objects within one another


def json_file(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it has more than LARGEST bytes, or as `json_object`.
    """
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"has {size:,} bytes, expected at most {LARGEST:,}")
    return json_object(path.read_bytes())


def json_object(text: bytes, *, strict: bool = True) -> dict[str, Any]:
    """The object that a text is.

    Args:
        strict: no value in it is NaN or infinite, or nested so deep that who walks it by recursion, as repr and deepcopy do, comes to no end.

    Raises:
        ValueError: as `json_value`; or it is no object, or nested too deep.
    """
    value = json_value(text, strict=strict)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    level: list[Any] = [value] if strict else []
    for _ in range(DEEPEST):
        parts = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = list(chain.from_iterable(parts))
    if level:
        raise ValueError(f"nested deeper than {DEEPEST}")
    return value


def json_value(text: bytes, *, strict: bool = True) -> Any:
    """What a text is, of any kind and depth. strict: no value in it is NaN or infinite.

    Raises:
        ValueError: the text is not UTF-8 or not JSON, or has an integer of more digits than Python reads or a field twice.
    """
    try:
        return json.loads(text.decode().rstrip(), object_pairs_hook=_unique, parse_constant=_refuse if strict else None)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if b"\n" in text.rstrip() else ""  # of one line, FILE:LINE says which
        raise ValueError(f"not JSON ({error.msg}: {line}column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        raise ValueError(f"not JSON ({error})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)[:40]!r} is there twice")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


FLOAT = "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
"""What YAML 1.2 takes for a number and PyYAML for a text, as it is resolved: 1e-4."""


class _Loader(yaml.SafeLoader):
    """A mapping's keys are strings, each there once, and 1e-4 is a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key.value, str):
                raise ValueError("a field's name is a list or a mapping, expected a text")
            if key.value in seen:
                raise ValueError(f"the field {key.value[:40]!r} is there twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few of them make a list of any size
            raise ValueError("an alias (*) is not taken")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(*FLOAT)


class _WordsLoader(_Loader):
    """As YAML 1.2: yes, no, on and off are words, as answers are."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in _Loader.yaml_implicit_resolvers.items()
    }


_WordsLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|false)$"), list("tf"))


def yaml_file(path: Path, *, words: bool = False) -> Any:
    """What a YAML file says, in plain types: no tags, no aliases, no field twice.

    Args:
        words: yes, no, on and off are words.

    Raises:
        OSError: it cannot be read.
        ValueError: it has more than LARGEST bytes, is not UTF-8 or not YAML; without the file's name.
    """
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"has {size:,} bytes, expected at most {LARGEST:,}")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _WordsLoader if words else _Loader)
    # What a tag of YAML's own stands before may be no number, truth or date: PyYAML looks at it unasked.
    except (ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None
