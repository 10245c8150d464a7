"""Iterate over the events of a run: it proceeds only when the next event is requested, and ends with the iterator.

transformers' loop cannot yield, so it runs in a thread that takes turns with the consumer: only one of the two works at
a time. What this module does not do: it makes no events (see `events`).
"""

import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..text.stopping import Stop
from .events import Decoders, EventSource, TokenEvent
from .model_info import device_of


def stream_events(
    model: Any, inputs: Any, decoders: Decoders, stop: Stop | None, options: dict[str, Any]
) -> Iterator[TokenEvent]:
    """Yield the events of `model.generate(inputs, **options)`.

    Closing the iterator ends the run, and the run's errors are raised here. Nothing runs before the first `next`.
    """
    run = _PausedRun(_thread_settings(device_of(model)))

    def work() -> list[TokenEvent]:
        last: list[TokenEvent] = []
        source = EventSource(decoders, stop, run.hand_over)
        output = model.generate(inputs, streamer=source, return_dict_in_generate=True, **options)
        source.emit = last.extend
        source.finish(output)
        return last

    return run.events(work)


class _Closed(BaseException):
    """Ends a run whose consumer has closed the iterator; never leaves the thread."""


class _PausedRun:
    """A thread that works only while its consumer waits.

    Args:
        settings: makes the thread's context manager.
    """

    def __init__(self, settings: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self.settings = settings
        self.wanted = threading.Semaphore(0)
        self.made: queue.SimpleQueue[tuple[list[TokenEvent], bool, BaseException | None]] = queue.SimpleQueue()
        self.closed = False

    def hand_over(self, events: list[TokenEvent]) -> None:
        """In the thread: pass events to the consumer, and wait for the next request."""
        if not events and not self.closed:
            return
        self.made.put((events, False, None))
        self.wanted.acquire()
        if self.closed:
            raise _Closed

    def events(self, work: Callable[[], list[TokenEvent]]) -> Iterator[TokenEvent]:
        """Run `work` in the thread; yield the events that it hands over, then those that it returns."""
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(self._work, work), daemon=True)
        thread.start()
        try:
            done = False
            while not done:
                events, done, error = self.made.get()
                yield from events
                if error is not None:
                    raise error
                if not done:
                    self.wanted.release()
        finally:
            self.closed = True
            self.wanted.release()
            thread.join()

    def _work(self, work: Callable[[], list[TokenEvent]]) -> None:
        try:
            with self.settings():
                last = work()
        except _Closed:
            return
        except BaseException as error:
            self.made.put(([], True, error))
        else:
            self.made.put((last, True, None))


def _thread_settings(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Copy this thread's torch settings for another thread: autocast and the current GPU."""
    kinds = {device.type, "cpu"}
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]

    @contextlib.contextmanager
    def settings() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            for kind, dtype in casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            yield

    return settings
