"""What `data.train` and `data.validation` name: a path, a pattern, a list of both, or a text file.

A text that ends in `.txt` is a file with a path or a pattern a line; empty lines, and those that
begin with `#`, are passed over.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vqrae_ds.config.checking import show
from vqrae_ds.config.patterns import MAX_PATHS, expand_braces

if TYPE_CHECKING:
    from vqrae_ds.config.schema import DataConfig

LIST_SUFFIX = ".txt"
INDEX_NAME = "index.json"  # in each folder of shards, but of those that are streamed
FROM_IMAGES = "a folder of images becomes shards by `python tools/make_shards.py IMAGES OUT`"


def expand_paths(setting: str, entries: str | Sequence[str]) -> list[str]:
    """All paths or URLs that a setting names, in its order.

    Raises `ValueError` where one is named twice, for its samples would come twice as often, for
    more than `MAX_PATHS` of them, and for a text file that cannot be read or is empty.
    """
    found: dict[str, None] = {}
    for entry in [entries] if isinstance(entries, str) else entries:
        for path in _paths_of(setting, entry):
            if path in found:
                raise ValueError(f"{setting} names {path} twice: name it once")
            if len(found) == MAX_PATHS:
                raise ValueError(f"{setting} names more than {MAX_PATHS} paths")
            found[path] = None
    return list(found)


def expand_folders(setting: str, entries: str | Sequence[str]) -> list[str]:
    """`expand_paths`, of folders: one that has two names, by a link or `./`, is one that is twice.

    Raises `ValueError` as `expand_paths` does.
    """
    paths = expand_paths(setting, entries)
    by_place: dict[str, str] = {}
    for path in paths:
        before = by_place.setdefault(os.path.realpath(path), path)
        if before != path:
            raise ValueError(f"{setting} names one folder twice, {before} and {path}: name it once")
    return paths


def data_folders(data: DataConfig) -> dict[str, str]:
    """The folders with an index that a run reads, by what each of them is set by.

    Raises `ValueError` as `expand_paths` does, also for shards that are streamed.
    """
    entries = {"data.train": data.train, "data.validation": data.validation}
    if data.streaming is not None:
        expand_paths("data.train", entries.pop("data.train"))
    found = {}
    for name, named in entries.items():
        for number, path in enumerate(expand_folders(name, named) if named else []):
            found[name if number == 0 else f"{name} ({number + 1})"] = path
    return found


def index_command(folder: Path) -> str:
    """The way out where an index is missing or no longer that of its shards."""
    return f"run `python tools/make_shards.py --index-only {shlex.quote(str(folder))}`"


def check_indexes(data: DataConfig) -> None:
    """Raise `ValueError` where a folder that needs an index has none."""
    for setting, folder in data_folders(data).items():
        if fault := missing_index(Path(folder)):
            raise ValueError(f"{setting}: {fault}")


def missing_index(folder: Path) -> str | None:
    """What to say where a folder has no index."""
    if (folder / INDEX_NAME).is_file():
        return None
    command = index_command(folder)
    return f"{folder} has no {INDEX_NAME}: if shards lie there, {command}; {FROM_IMAGES}"


def _paths_of(setting: str, entry: str) -> Iterator[str]:
    if not entry.endswith(LIST_SUFFIX):
        yield from expand_braces(entry)
        return
    try:
        with open(entry, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        what = "it must be a text file with a path a line"
        raise ValueError(f"{setting} = {show(entry)} cannot be read ({error}): {what}") from error
    named = [line for line in lines if line and not line.startswith("#")]
    if not named:
        raise ValueError(f"{setting} = {show(entry)} is a file without any path")
    for line in named:
        if line.endswith(LIST_SUFFIX):
            raise ValueError(f"{setting}: {entry} names {line}: a list of lists is not read")
        yield from expand_braces(line)
