"""The processes of a run: find out how many there are, wait, broadcast, and assign batches to them.

This module knows neither files nor models.
"""

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .requests import Refused

T = TypeVar("T")

_TIMEOUT = timedelta(days=30)  # the processes of a run end hours apart, and accelerate's own limit is minutes


def process_state() -> PartialState:
    """Return accelerate's state of this run's processes; a single one unless a launcher started more.

    Raises:
        ValueError: accelerate was set up before for another number of processes than the launcher started.
        ConnectionError: another process ended before all had met.
    """
    wanted = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    # Without an accelerator, accelerate recognizes the processes only if it is told cpu=True.
    try:
        state = PartialState(cpu=wanted or not _has_accelerator(), timeout=_TIMEOUT)
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        raise _lost() from error
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != state.num_processes:
        raise ValueError(
            f"the launcher started {launched} processes, but accelerate was set up for {state.num_processes} before: "
            "call batch.process_state() before anything else uses accelerate"
        )
    return state


def _has_accelerator() -> bool:
    accelerator = getattr(torch, "accelerator", None)  # torch 2.6
    return torch.cuda.is_available() if accelerator is None else bool(accelerator.is_available())


def wait_for_all(state: PartialState) -> None:
    """Wait until every process has reached this call.

    Raises:
        ConnectionError: one of them ended before.
    """
    try:
        state.wait_for_everyone()
    except RuntimeError as error:  # what torch raises when a peer's connection closes
        raise _lost() from error


def leave(state: PartialState) -> None:
    """End this process's part of the run: wait until the others are here or lost, then close the connection.

    Without the wait, closing may never return under torch 2.6: it holds Python's lock while it waits for a thread of
    torch's that wants the lock to free what was broadcast last.
    """
    if state.num_processes > 1:
        with contextlib.suppress(ConnectionError):
            wait_for_all(state)
        state.destroy_process_group()


def on_main(state: PartialState, work: Callable[[], T]) -> T:
    """Run `work` on the main process; broadcast its result, or raise its error on every rank.

    Raises:
        Refused: `work` raised a ValueError or an OSError; the main process raises that error itself.
        ConnectionError: a process ended before.
    """
    box: list[tuple[T | None, str | None]] = [(None, None)]
    failure: Exception | None = None
    if state.is_main_process:
        try:
            box = [(work(), None)]
        except (ValueError, OSError) as error:
            box, failure = [(None, str(error))], error
    _broadcast(box)
    result, message = box[0]
    if failure is not None:
        raise failure
    if message is not None:
        raise Refused(message)
    return cast(T, result)


def _broadcast(box: list[Any]) -> None:
    try:
        broadcast_object_list(box)
    except RuntimeError as error:
        raise _lost() from error


def _lost() -> ConnectionError:
    return ConnectionError(
        "another process of this run ended before its work was done: the same command takes up what is missing"
    )


class LeastLoaded:
    """Assigns each piece of work to the process with the least load so far; every process computes the same.

    >>> schedule = LeastLoaded(2)
    >>> [schedule.assign(cost) for cost in (5, 3, 1, 4)]
    [0, 1, 1, 1]
    """

    def __init__(self, processes: int) -> None:
        self.loads = [0] * processes

    def assign(self, cost: int) -> int:
        """Return the process for a piece of this cost; among equal loads, the first."""
        process = self.loads.index(min(self.loads))
        self.loads[process] += cost
        return process
