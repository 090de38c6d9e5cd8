"""Counts what code asks of its peers and of its device: collectives, and waits for the device.

Both are counted at PyTorch's dispatcher, the lowest place that DeepSpeed, torch.distributed and the
trainer's own calls have in common. It costs time: what is counted is not timed.

On a CPU nothing waits, so what would wait on a GPU is counted: values read back into Python, and
results whose shape depends on values. A copy by `.to(...)` looks like one to the device there and
is not counted. On a GPU CUDA reports its waits itself, the latter included; PyTorch calls that
report a prototype: it leaves out explicit calls of `synchronize`, which are therefore counted where
they are made, of an event or a stream only if it is not done by then; and what NCCL waits for.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = ("c10d", "_c10d_functional")  # namespaces of operators
NO_COLLECTIVES = ("wait_tensor",)
READ_BACK = ("_local_scalar_dense",)  # what item(), bool(), int() and float() of a tensor come to
SHAPED_BY_VALUES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive")
# Below these no operator runs for a tensor that is on the CPU already.
COPIES = ("cpu", "numpy", "tolist", "__array__")
CUDA_WARNING = "called a synchronizing CUDA operation"
# Frames of these are passed over where the place of a call is looked for.
PASSED_OVER = (f"{Path(torch.__file__).parent}{os.sep}", __file__, contextlib.__file__)


class Call(NamedTuple):
    """An operator, and the file and line that called it, the nearest outside PyTorch."""

    operator: str
    place: str


class Counts(NamedTuple):
    """How often each call was made."""

    collectives: Counter[Call]
    waits: Counter[Call]


@contextlib.contextmanager
def counted(device_type: str) -> Iterator[Counts]:
    """Inside, the calls of this thread and of its backward passes are counted.

    `device_type` is `cpu` or `cuda`. The counts are complete on leaving.
    """
    counts = Counts(Counter(), Counter())
    with contextlib.ExitStack() as stack:
        if device_type == "cuda":
            stack.enter_context(_cuda_waits(counts.waits))
        else:
            stack.enter_context(_Copies(counts.waits))
        stack.enter_context(_explicit_waits(counts.waits))
        stack.enter_context(_Operators(counts, on_cpu=device_type == "cpu"))
        yield counts


def extra(ours: Counter[Call], peer: Counter[Call]) -> int:
    """How many more calls ours makes, summed over the operators of which it makes more.

    Fewer calls of one operator do not make up for more of another.
    """
    return (_by_operator(ours) - _by_operator(peer)).total()


def _by_operator(calls: Counter[Call]) -> Counter[str]:
    total: Counter[str] = Counter()
    for call, number in calls.items():
        total[call.operator] += number
    return total


class _Operators(TorchDispatchMode):
    def __init__(self, counts: Counts, *, on_cpu: bool) -> None:
        super().__init__()
        self.counts, self.on_cpu = counts, on_cpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace in COLLECTIVES and name not in NO_COLLECTIVES:
            self.counts.collectives[_call(name)] += 1
        elif self.on_cpu and (name in READ_BACK + SHAPED_BY_VALUES or _is_masked(name, args)):
            self.counts.waits[_call(name)] += 1
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    def __init__(self, found: Counter[Call]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in COPIES:
            self.found[_call(name)] += 1
        return func(*args, **(kwargs or {}))


def _is_masked(name: str, args: tuple) -> bool:
    """Whether a tensor is read at a mask, whose number of true values is the result's length."""
    if name != "index":
        return False
    masks = (torch.bool, torch.uint8)
    return any(index is not None and index.dtype in masks for index in args[1])


@contextlib.contextmanager
def _cuda_waits(found: Counter[Call]) -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if CUDA_WARNING in str(warning.message):
            place = f"{Path(warning.filename).name}:{warning.lineno}"
            found[Call("wait for CUDA", place)] += 1


@contextlib.contextmanager
def _explicit_waits(found: Counter[Call]) -> Iterator[None]:
    """Count `synchronize` of the device, and of CUDA's events and streams that are not done."""
    with contextlib.ExitStack() as stack:
        for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
            wait, may_be_done = owner.synchronize, owner is not torch.cuda
            owner.synchronize = _noting(wait, found, may_be_done)
            stack.callback(setattr, owner, "synchronize", wait)
        yield


def _noting(
    wait: Callable[..., None], found: Counter[Call], may_be_done: bool
) -> Callable[..., None]:
    def wait_and_note(*arguments: Any, **options: Any) -> None:
        if not (may_be_done and arguments[0].query()):
            found[_call("synchronize")] += 1
        wait(*arguments, **options)

    return wait_and_note


def _call(operator: str) -> Call:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(PASSED_OVER):
        frame = frame.f_back
    if frame is None:
        return Call(operator, "?")
    return Call(operator, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
