"""Reads YAML and JSON files, each mistake as one line that says where it is.

A key that is given twice is refused; both libraries would keep the last value in silence. A recipe
may state only what differs from another, its `base`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vqrae_ds.config.checking import show

BASE = "base"


class Recipe(NamedTuple):
    """The keys and values of a YAML over those of its `base`, where it names one."""

    values: dict[str, Any]
    base_path: Path | None
    base_values: dict[str, Any]


class _Pairs(list):
    """Keys and values of a mapping as they stand in the file, with repeated keys."""


class _Loader(yaml.SafeLoader):
    """Keeps repeated keys, and reads 1e-3 as a number where YAML 1.1 reads a text."""


_Loader.add_constructor(
    "tag:yaml.org,2002:map", lambda loader, node: _Pairs(loader.construct_pairs(node, deep=True))
)
# `<<` is a key like any other, so that nothing is set twice.
_Loader.add_constructor("tag:yaml.org,2002:merge", yaml.SafeLoader.construct_yaml_str)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_recipe(path: Path, name: str) -> Recipe:
    """The YAML in `path`, and under it the one that its key `base` names relative to it.

    Sections are merged key by key; any other value replaces the base's, and null is a value.
    Raises `ValueError` as `read_yaml` does, and where a base has a base.
    """
    own = read_yaml(path, name)
    if BASE not in own:
        return Recipe(own, None, {})
    base = own.pop(BASE)
    if not isinstance(base, str) or not base:
        raise ValueError(f"{name}: {path}: {BASE} = {show(base)} must be the path of a YAML file")
    base_path = path.parent / base
    base_values = read_yaml(base_path, f"{name}: {path}: {BASE}")
    if BASE in base_values:
        raise ValueError(
            f"{name}: {path}: {BASE} = {show(base)}, and {base_path} has the key {BASE} itself: "
            "name a file without one"
        )
    return Recipe(_merge(base_values, own), base_path, base_values)


def read_yaml(path: Path, name: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `ValueError`; `name` is the setting that gave the path."""
    return _read(path, name, "YAML", lambda text: yaml.load(text, Loader=_Loader))


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file. Raises `ValueError`; `name` is the setting that gave the path."""
    return _read(path, name, "JSON", lambda text: json.loads(text, object_pairs_hook=_Pairs))


def parse_value(text: str) -> Any:
    """A value of the command line, read as YAML. Raises `ValueError`."""
    try:
        return _to_dicts(yaml.load(text, Loader=_Loader), "")
    except yaml.YAMLError as error:
        raise ValueError(_explain(error)) from error


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _read(path: Path, name: str, kind: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = _to_dicts(parse(text), "") if text.strip() else None
    except OSError as error:
        raise ValueError(f"{name}: {path}: {error.strerror.lower()}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: {path} is not valid {kind}: {_explain(error)}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {path} is not valid {kind}: {error}") from error
    if content is None:
        raise ValueError(f"{name}: {path} is empty")
    if not isinstance(content, dict):
        raise ValueError(f"{name}: {path} must hold keys and values, not {show(content)}")
    return content


def _to_dicts(value: Any, name: str) -> Any:
    """`value` with its pairs as dicts; `name` is where it stands in the file."""
    if not isinstance(value, list):
        return value
    if not isinstance(value, _Pairs):
        return [_to_dicts(item, f"{name}.{i}") for i, item in enumerate(value)]
    result: dict[str, Any] = {}
    for key, item in value:
        if not isinstance(key, str) or not key or not key.isprintable():
            raise ValueError(f"the key {show(key)} in {name or 'the file'} must be printable text")
        full_name = f"{name}.{key}" if name else key
        item = _to_dicts(item, full_name)
        if key in result:
            raise ValueError(f"{full_name} is given twice: {show(result[key])} and {show(item)}")
        result[key] = item
    return result


def _explain(error: yaml.YAMLError) -> str:
    """PyYAML's message without its drawing of the spot."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    steps = ((error.context, error.context_mark), (error.problem, error.problem_mark))
    return ": ".join(f"{what} in line {mark.line + 1}" for what, mark in steps if what and mark)
