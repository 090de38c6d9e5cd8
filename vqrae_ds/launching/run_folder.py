"""A run as its launcher sees it: a command line, a folder, a wish to stop, a marker at the end."""

from __future__ import annotations

import argparse
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from vqrae_ds.config import Run, parse_command_line
from vqrae_ds.launching.owner import Owner, release, take
from vqrae_ds.stopping import DONE, PREEMPTED, SIGNALS, STOP

logger = logging.getLogger(__name__)


def add_trainer_arguments(parser: argparse.ArgumentParser) -> None:
    """What a launch script takes for the trainer: both files, and anything behind them."""
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("deepspeed_config", metavar="DEEPSPEED.json")
    others = parser.add_argument("others", nargs=argparse.REMAINDER, metavar="a.b=value")
    others.required = False  # Pythons differ: some would name it among what is missing


def trainer_arguments(config: str, deepspeed_config: str, others: Sequence[str]) -> list[str]:
    """The trainer's arguments from those of a launch script."""
    return ["--config", config, "--deepspeed_config", deepspeed_config, *others]


def check_run(arguments: Sequence[str], ranks: int) -> Run:
    """The run that so many ranks would train, as a dry run finds it.

    Raises `ValueError` with one line on any mistake of the user.
    """
    return parse_command_line([*arguments, "--dry-run", "--gpus", str(ranks)]).run


class RunFolder:
    """The files by which a launcher and the ranks understand each other."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()
        self.launch = self.path / "launch"  # what a launcher writes for its own use
        self.times_asked = 0
        self._owner: Owner | None = None

    def open(self, owner: Owner) -> None:
        """Create it for `owner`, and remove what an earlier start has left behind.

        An old PREEMPTED would have a job that fails at its start requeued for ever. Raises
        `ValueError` with one line where another launch of the run lives.
        """
        self.launch.mkdir(parents=True, exist_ok=True)
        take(self.launch / "owner.json", owner)
        self._owner = owner
        for name in (STOP, DONE, PREEMPTED):
            (self.path / name).unlink(missing_ok=True)
        if self.times_asked:
            self.ask_to_stop()

    def close(self) -> None:
        """Leave the run to the next launch."""
        if self._owner is not None:
            release(self.launch / "owner.json", self._owner)

    def ask_to_stop(self) -> None:
        """Have the ranks end after a checkpoint, by the file that the first of them looks for."""
        (self.path / STOP).touch()

    def turn_signals_into_stop(self) -> None:
        """From here on a signal to this process asks the ranks to stop; `times_asked` counts."""
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def marker(self) -> str | None:
        """DONE or PREEMPTED, as the ranks have left it; `None` if they have not."""
        return next((name for name in (DONE, PREEMPTED) if (self.path / name).exists()), None)

    def checkpoints(self) -> set[tuple[str, int]]:
        """Name of each complete checkpoint, and when it was written: who made one sees another."""
        found = self.path.glob("checkpoints/step_*/manifest.json")
        return {(path.parent.name, path.stat().st_mtime_ns) for path in found}

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.times_asked += 1
        logger.warning("%s: asking the ranks to stop", signal.Signals(number).name)
        if self._owner is not None:  # else it is another launch's
            self.ask_to_stop()
