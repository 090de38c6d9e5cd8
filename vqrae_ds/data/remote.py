"""Shards by path or URL, to be read forwards; whatever a store raises is an `OSError` here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import urlsplit

SCHEMES = ("", "file", "https", "s3", "gs")  # nothing that runs a command, as webdataset's pipe:


def check_url(url: str) -> None:
    """Raise `ValueError` unless it is a local path or a URL of `SCHEMES`."""
    scheme = urlsplit(url).scheme
    if scheme not in SCHEMES or "::" in url:
        allowed = ", ".join(filter(None, SCHEMES))
        raise ValueError(f"data.train: {url} is refused: give a local path, or a URL of {allowed}")


@contextlib.contextmanager
def open_shard(url: str) -> Iterator[BinaryIO]:
    """A shard, as a context. Remote stores need the package that fsspec has for them.

    Raises `OSError` where it cannot be opened, and so does its reading; `ValueError` where the
    package is missing.
    """
    if not urlsplit(url).scheme:
        with open(url, "rb") as file:
            yield file
        return
    import fsspec

    try:
        with _errors_of_the_store():
            remote = fsspec.open(url, "rb").open()
    except ImportError as error:
        raise ValueError(f"data.train: {url} cannot be opened here: {error}") from error
    try:
        yield cast(BinaryIO, _Remote(remote))
    finally:
        with contextlib.suppress(Exception):  # of a file that was only read nothing can be lost
            remote.close()


class _Readable(Protocol):
    def read(self, count: int) -> bytes: ...


class _Remote:
    def __init__(self, file: _Readable) -> None:
        self._file = file

    def read(self, count: int) -> bytes:
        with _errors_of_the_store():
            return self._file.read(count)


@contextlib.contextmanager
def _errors_of_the_store() -> Iterator[Any]:
    """Each store has exceptions of its own for a server that does not answer, or says 500.

    They have no common ancestor but `Exception`, so that all of them are caught: around these two
    calls there is no code of ours that could fail instead.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
