"""The entry point and the one training loop, for both stages.

    deepspeed --module vqrae_ds.train --config Y.yaml --deepspeed_config J.json [a.b=value ...]

A step: next batch -> engine forward -> objective -> is it sound? -> backward, step -> the
discriminator's turn. What is due after it, in this order: log, validation, checkpoint. The same
command again resumes.

Exit status: 0 done, 85 asked to stop (`stopping`), 1 failed, 2 a user's mistake, 3 hung (watchdog).
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from vqrae_ds import watchdog
from vqrae_ds.command_line import USER_ERRORS, configure_logging, end_process_after, exit_with
from vqrae_ds.config import Run, describe, parse_command_line
from vqrae_ds.data.failure import DataFailed, naming_rank
from vqrae_ds.lost_process import ending_when_one_is_lost
from vqrae_ds.preparation import Setup, prepare, set_learning_rates, stop_request_of, watchdog_of
from vqrae_ds.run_folder import record
from vqrae_ds.stopping import PREEMPTED_STATUS, hold_signals

if TYPE_CHECKING:
    from torch import Tensor

    from vqrae_ds.checkpoint import Saver, TrainState
    from vqrae_ds.monitoring.monitor import Monitor

logger = logging.getLogger("vqrae_ds.train")


class TrainingStopped(RuntimeError):
    """The run cannot go on by itself, on all ranks alike; the message says why."""


class Preempted(RuntimeError):
    """The run was asked to stop, and goes on when it is started again."""


class MicroStep(NamedTuple):
    """Detached terms of the losses, and the squared gradient norm of this rank's share by part."""

    terms: dict[str, Tensor]
    gradient_squares: dict[str, Tensor]


def main() -> None:
    """Check, prepare, train. A user's mistake is one line and exit status 2, any failure 1.

    So is a disk that is full, or gone, when the run begins.
    """
    try:
        run, dry_run = parse_command_line()
    except ValueError as error:  # the same on every rank of a node: one of them says it
        exit_with(error, silent=os.environ.get("LOCAL_RANK", "0") != "0")
    if dry_run:
        sys.stdout.write(describe(run) + "\n")
        return
    rank = int(os.environ.get("RANK", "0"))
    configure_logging(rank)
    stop_request = stop_request_of(run)
    hold_signals()
    with watchdog_of(run, rank), ending_when_one_is_lost(rank):
        # Imported here, so that a mistake in the configuration does not wait for torch.
        from vqrae_ds.ranks import is_said_by_peer

        try:
            setup = prepare(run, stop_request)
        except USER_ERRORS as error:
            # VQRAE_LOG_LEVEL=DEBUG shows it.
            logger.debug("the mistake was found here", exc_info=True)
            exit_with(error, silent=is_said_by_peer(error, rank))
        except OSError as error:
            exit_with(error, silent=is_said_by_peer(error, rank), status=1)
        stop_request.catch_signals()
        try:
            train(run, setup)
        except TrainingStopped as stop:
            exit_with(stop, silent=rank != 0, status=1)
        except DataFailed as failure:  # its peers wait in a collective: the launcher ends them
            exit_with(failure)
        except Preempted as stop:
            logger.warning("%s", stop)
            sys.exit(PREEMPTED_STATUS)


def train(run: Run, setup: Setup) -> None:
    """The loop: from `setup.state` to the last step.

    Raises, after a checkpoint, `TrainingStopped` where too many steps in a row had to be skipped,
    and `Preempted` where the run was asked to stop; the former also where the last checkpoint could
    not be written, and, before the first step, where the records of the run cannot. `DataFailed` is
    raised on one rank alone, and without a checkpoint.
    """
    from vqrae_ds import engines
    from vqrae_ds.checkpoint import Saver
    from vqrae_ds.monitoring.profiler import StepProfiler
    from vqrae_ds.sharding.parameter_groups import learning_rates

    config, (sizes, total_steps) = run.config, run.schedule
    guard, state, saver = setup.guard, setup.state, Saver(run)
    batches = naming_rank(setup.ranks.rank, setup.batches)
    is_first, is_stopping = setup.ranks.rank == 0, setup.stop.at_once()
    with (
        closing(_begin_records(run, setup)) as monitor,
        closing(StepProfiler(run)) as profiler,
    ):
        while state.step < total_steps and not setup.must_stop() and not is_stopping:
            is_logged = is_due(state.step + 1, config.monitor.log_every_steps, total_steps)
            rates = learning_rates(setup.generator, setup.discriminator)  # of this step
            with profiler.step(state.step + 1):
                for micro in range(sizes.accumulation):
                    watchdog.begin(f"step {state.step + 1}")
                    with monitor.waiting_for_data():
                        batch = next(batches)
                    setup.bad_data.add(len(batch.keys), batch.skipped)
                    images = batch.images_B3HW.to(setup.ranks.device, non_blocking=True)
                    is_measured = is_logged and micro == sizes.accumulation - 1
                    terms, squares = micro_step(setup, images, state.step, measure=is_measured)
                    monitor.add(terms)
                finish_step(setup, state.step)
            monitor.window.add_step(setup.generator.module.vqrae.quantizer)
            state = state._replace(step=state.step + 1, samples=state.samples + sizes.global_batch)
            is_stopping = setup.stop.count()
            is_last = state.step == total_steps or setup.must_stop() or is_stopping

            if is_logged:
                monitor.add_gradients(squares)
            if is_logged or is_last:  # why a run ends is in its last steps
                numbers, largest = _numbers(setup, saver, setup.equalize()), guard.largest()
                guard.learn(monitor.log(state.step, state.samples, rates, numbers, largest))
                is_last = is_last or setup.must_stop()  # the counts of bad samples have come
            with monitor.paused():
                is_validated = is_due(state.step, config.monitor.validate_every_steps, total_steps)
                if is_validated and (not is_stopping or state.step == total_steps):
                    _validate(run, setup, monitor, state.step)
                if is_last or state.step % config.checkpoint.every_steps == 0:
                    watchdog.begin(f"the checkpoint after step {state.step}")
                    _save(setup, state, saver, is_last=is_last)
        if is_first and not setup.must_stop() and saver.failure is None:
            setup.stop.request.leave_mark(is_done=state.step == total_steps)
        engines.stop()
    _check_end(setup, saver, state.step)
    if state.step < total_steps:
        raise Preempted(f"asked to stop after step {state.step}: the same command goes on from it")
    logger.info("done: %d steps, %s", state.step, config.run.output_dir)


def micro_step(setup: Setup, images_B3HW: Tensor, step: int, *, measure: bool = False) -> MicroStep:
    """Both backwards of one micro batch; with the last one of a step come the optimizers' steps.

    A loss that `setup.guard` finds unsound becomes NaN, so that all ranks skip the step. With
    `measure`, for the last micro batch of a step, the gradients are measured.
    """
    from vqrae_ds.sharding.partitions import gradient_squares

    generator, objective = setup.generator, setup.objective
    loss = objective.generator(generator(images_B3HW), images_B3HW, step)
    soundness = setup.guard.judge(loss.terms)
    generator.backward(loss.surrogate * soundness)
    squares = gradient_squares(generator) if measure else {}
    generator.step()
    if not objective.trains_discriminator(step):
        return MicroStep(loss.terms, squares)
    images_hat_B3HW = loss.images_hat_B3HW
    verdict = objective.discriminator_loss(setup.discriminator, images_B3HW, images_hat_B3HW, step)
    soundness = soundness * setup.guard.judge(verdict.terms)
    setup.discriminator.backward(verdict.total * soundness)
    setup.discriminator.step()
    return MicroStep(loss.terms | verdict.terms, squares)


def finish_step(setup: Setup, step: int) -> None:
    """What follows the optimizers' steps, or that one of them, on all ranks alike, took none."""
    is_taken = setup.generator.was_step_applied()
    setup.generator.module.vqrae.quantizer.finish_step(is_taken=is_taken)
    if is_taken and setup.ema is not None:
        setup.ema.update()
    if setup.objective.trains_discriminator(step):
        is_taken = is_taken and setup.discriminator.was_step_applied()
    if is_taken:
        setup.guard.step_taken()
    else:
        setup.objective.forget()
        setup.guard.step_skipped(step + 1)
        set_learning_rates(setup.generator, setup.discriminator, setup.objective.config, step + 1)


def _begin_records(run: Run, setup: Setup) -> Monitor:
    """The monitor, and in the run's folder what the run is, unless it is done already."""
    from vqrae_ds.monitoring.monitor import Monitor
    from vqrae_ds.ranks import failing_together

    try:
        with failing_together():
            if setup.ranks.rank == 0 and setup.state.step < run.schedule.total_steps:
                record(run)
                setup.stop.request.clear_marks()
            return Monitor(run, setup.state.step, setup.bad_data)
    except OSError as error:
        raise TrainingStopped(f"the records of the run cannot be written: {error}") from error


def is_due(step: int, every: int, total: int) -> bool:
    """Whether what happens every `every` steps, and after the last one, happens after `step`."""
    return step % every == 0 or step == total


def _validate(run: Run, setup: Setup, monitor: Monitor, step: int) -> None:
    from vqrae_ds.data.opening import Reader, open_evaluation
    from vqrae_ds.evaluation.metrics import validate

    if setup.validation_index is None:
        return
    batches = open_evaluation(
        setup.validation_index,
        run.config.data,
        Reader.of(setup.ranks),
        image_size=run.config.model.image_size,
        batch_size=run.schedule.batch.micro_batch,
    )
    batches = naming_rank(setup.ranks.rank, batches)
    batches = watchdog.watching(batches, f"the validation after step {step}")
    validation = validate(
        setup.generator,
        batches,
        setup.perceptual,
        setup.ranks.device,
        run.config.monitor.num_images,
    )
    monitor.log_validation(step, validation)


def _save(setup: Setup, state: TrainState, saver: Saver, *, is_last: bool) -> None:
    from vqrae_ds.checkpoint import Content

    setup.objective.settle()
    content = Content(
        setup.generator,
        setup.discriminator,
        state,
        ema=setup.ema,
        extra=setup.extra(),
        pretrained=setup.pretrained,
        # These may be the weights that the steps are skipped for.
        replaces_old=setup.guard.skipped_in_a_row == 0,
    )
    if is_last:
        saver.save_last(content)
    else:
        saver.save(content)


def _check_end(setup: Setup, saver: Saver, step: int) -> None:
    """Raise `TrainingStopped` where the loop ended by itself, or without its last checkpoint."""
    guard = setup.guard
    if guard.must_stop():
        reason = f"{guard.skipped_in_a_row} steps in a row were skipped, the last: {guard.reason()}"
        if saver.failure is None:
            raise TrainingStopped(
                f"{reason}. {saver.newest} holds the weights of the last step that was taken. If "
                "they are what is wrong, remove that folder: the same command then goes on from "
                "the checkpoint before it"
            )
        raise TrainingStopped(f"{reason}. Its weights could not be saved: {saver.failure}")
    if saver.failure is not None:
        raise TrainingStopped(
            f"the weights after step {step}, the last, could not be saved: {saver.failure}. Make "
            "room and give the same command again: it goes on from the newest checkpoint"
        )
    if setup.bad_data.must_stop():
        raise TrainingStopped(
            f"{setup.bad_data.reason()}. {saver.newest} is saved: mend the shards, or raise it"
        )


def _numbers(setup: Setup, saver: Saver, difference: float) -> dict[str, float]:
    """What every rank knows by itself, and by how much its tensor-parallel group had differed."""
    numbers = {
        "optim/skipped_steps": setup.guard.skipped_steps,
        "checkpoint/failed_saves": saver.failed_saves,
    }
    if setup.ranks.tensor_size > 1:
        numbers["optim/replica_difference"] = difference
    if setup.discriminator is not None:
        norm = setup.discriminator.get_global_grad_norm()
        if norm is not None:  # before its first step
            numbers["optim/gradient_norm_discriminator"] = float(norm)
    return numbers


if __name__ == "__main__":
    end_process_after(main)
