"""What can be wrong with a sample, by kind.

A sample that cannot be used is refused, and ends the run with its shard and key, or it is skipped:
another one takes its place.
"""

from __future__ import annotations

from typing import NamedTuple

MISSING_SHARD, RESIZED_SHARD, UNREADABLE = "missing_shard", "resized_shard", "unreadable"
EMPTY, TOO_LONG, NOT_AN_IMAGE = "empty", "too_long", "not_an_image"
TOO_LARGE, TOO_MANY_SCANS, CORRUPT = "too_large", "too_many_scans", "corrupt"
REFUSED_MEMBER, DUPLICATE_KEY = "refused_member", "duplicate_key"
CUT_SHARD, DAMAGED_SHARD = "cut_shard", "damaged_shard"
KINDS = (
    MISSING_SHARD,  # the file of the shard is not there
    RESIZED_SHARD,  # it has another size than its index says, or ends inside the sample
    UNREADABLE,  # the disk does not give it
    EMPTY,  # a member of no bytes
    TOO_LONG,  # more bytes than data.max_image_bytes
    NOT_AN_IMAGE,  # neither JPEG nor PNG nor WebP: a web page, a pickle, another format
    TOO_LARGE,  # more pixels than data.max_image_pixels, or too long a side
    TOO_MANY_SCANS,  # a JPEG that takes minutes for each of its pixels
    CORRUPT,  # the decoder finds it cut or damaged
    # Met where there is no index; one is built without them, or not at all.
    REFUSED_MEMBER,  # no image and no companion of one: it may hold code
    DUPLICATE_KEY,  # a second image of its key in the shard
    CUT_SHARD,  # the tar ends too early
    DAMAGED_SHARD,  # no header is where one must be
)


# Faults that one reader may meet and another not: a file server answers each by itself.
OF_THE_READER = frozenset({MISSING_SHARD, RESIZED_SHARD, UNREADABLE})


class BadSample(ValueError):
    """A sample that cannot be used; the message says why, `kind` is one of `KINDS`."""

    def __init__(self, message: str, kind: str = CORRUPT) -> None:
        super().__init__(message)
        assert kind in KINDS, kind
        self.kind = kind


class Policy(NamedTuple):
    """What becomes of a sample that cannot be used: the run ends, or another one stands in.

    Where other ranks read the same samples, each for itself (`has_twins`), none may stand in for
    what one of them alone may lack: they would train on different images.
    """

    skip: bool = False
    has_twins: bool = False

    def skips(self, kind: str) -> bool:
        return self.skip and not (self.has_twins and kind in OF_THE_READER)


REFUSE = Policy()


class Skipped(NamedTuple):
    """A sample, or a shard, that could not be used; `message` names shard and key."""

    kind: str
    message: str
