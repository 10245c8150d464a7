"""Results of continuous batching: each request's own, in the order in which they come.

transformers puts the results of all requests into one queue. Whoever waits there for one request takes the others' and
puts them back at the end, so that streamed results come out of order, and waits on after a request was cancelled. Here
a result is taken by its request, and none comes of a cancelled one. What this module does not do: it makes no results.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput

_LOOK = 0.2  # seconds after which to see whether results can still come
_CANCELLED = 10_000  # ids of cancelled requests to remember


class Results(queue.Queue[GenerationOutput]):
    """Results that wait to be taken, and which requests may still have some."""

    def __init__(self) -> None:
        super().__init__()
        self._in_flight: set[str] = set()
        self._cancelled: dict[str, None] = {}  # in order

    def knows(self, request_id: str) -> bool:
        """Whether a request of this id is in flight, or was cancelled."""
        return request_id in self._in_flight or request_id in self._cancelled

    def begin(self, request_id: str, copies: Sequence[str]) -> None:
        """Note a request and its copies as in flight.

        Raises:
            ValueError: one of this id is in flight, or was cancelled: transformers' loop may still have to forget it.
        """
        with self.mutex:
            if self.knows(request_id):
                state = "is in flight" if request_id in self._in_flight else "was cancelled"
                raise ValueError(f"request_id must be new, but {request_id!r} {state}: choose another")
            self._in_flight.update((request_id, *copies))

    def end(self, request_id: str) -> None:
        """Note that no more results of a request come."""
        with self.mutex:
            self._in_flight.discard(request_id)
            self.not_empty.notify_all()

    def forget(self, request_id: str) -> bool:
        """Drop a request's results, those to come too; return whether it was in flight."""
        with self.mutex:
            kept = [result for result in self.queue if result.request_id != request_id]
            self.queue.clear()
            self.queue.extend(kept)
            if request_id not in self._in_flight:
                return False
            self._in_flight.discard(request_id)
            self._cancelled[request_id] = None
            if len(self._cancelled) > _CANCELLED:
                del self._cancelled[next(iter(self._cancelled))]
            self.not_empty.notify_all()
            return True

    def was_cancelled(self, request_id: str) -> bool:
        """Whether a request was cancelled."""
        return request_id in self._cancelled

    def take(
        self, request_id: str | None, timeout: float | None, goes_on: Callable[[], bool]
    ) -> GenerationOutput | None:
        """Wait for the first result of a request, or of any; None after `timeout` seconds, or if none can come."""
        until = None if timeout is None else time.monotonic() + timeout
        with self.not_empty:
            while True:
                for place, result in enumerate(self.queue):
                    if request_id is None or result.request_id == request_id:
                        del self.queue[place]
                        return result
                left = _LOOK if until is None else until - time.monotonic()
                if left <= 0 or not goes_on() or (request_id is not None and request_id not in self._in_flight):
                    return None
                self.not_empty.wait(min(left, _LOOK))

    def _put(self, item: GenerationOutput) -> None:
        """Store a result; `queue.Queue` calls this under its lock."""
        if item.request_id in self._cancelled:
            return
        super()._put(item)
        if item.is_finished():
            self._in_flight.discard(item.request_id)
        self.not_empty.notify_all()


class Router(OutputRouter):
    """transformers' router: results go to the handler of their request, if it has one, else to `results`.

    Args:
        finish: prepares a result before it is delivered.
        cancel: cancels a request whose handler's event loop was closed.
    """

    def __init__(self, finish: Callable[[GenerationOutput], GenerationOutput], cancel: Callable[[str], None]) -> None:
        super().__init__()
        self.output_queue = self.results = Results()
        self._finish, self._cancel = finish, cancel
        self._delivery = threading.RLock()  # a handler that is registered meanwhile gets what came before it first

    def deliver(self, output: GenerationOutput) -> None:
        """Deliver a result to its handler, in that handler's own event loop, or to `results`."""
        with self._delivery:
            self._hand_over(self._finish(output))

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """Deliver results one by one, since their handlers may be of different event loops."""
        for output in outputs:
            self.deliver(output)

    @contextlib.contextmanager
    def handing_over(self, request_id: str) -> Iterator[None]:
        """While a handler is registered, deliver nothing; then deliver to it what came before."""
        with self._delivery:
            yield
            while (output := self.results.take(request_id, 0, lambda: False)) is not None:
                self._hand_over(output)

    def drop_handler(self, request_id: str) -> None:
        """Call a request's handler no more."""
        with self._lock:
            self.result_handlers.pop(request_id, None)

    def _hand_over(self, output: GenerationOutput) -> None:
        with self._lock:
            handler, loop = self.result_handlers.get(output.request_id, (None, None))
        if handler is None or loop is None:
            self.output_queue.put(output)
        elif not self.results.was_cancelled(output.request_id):
            if output.is_finished():
                self.results.end(output.request_id)
            try:
                loop.call_soon_threadsafe(handler, output)
            except RuntimeError:  # the loop is closed, and nobody hears of the request any more
                self._cancel(output.request_id)
