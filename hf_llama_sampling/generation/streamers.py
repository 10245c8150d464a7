"""End the caller's streamer even if the call fails, so that its readers do not wait for ever; hand it padded prompts.

What this module does not do: it makes no text; the caller's streamers do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class _Tracked:
    """A streamer that records whether it has been ended."""

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.ended = streamer, False

    def put(self, value: Any) -> None:
        """Pass tokens on."""
        self.streamer.put(value)

    def end(self) -> None:
        """End the stream."""
        self.ended = True
        self.streamer.end()


class WithPrompts:
    """A streamer whose first tokens, the prompts, are replaced: the loop's own are padded with tokens of the text."""

    def __init__(self, streamer: Any, prompts: Tensor) -> None:
        self.streamer, self.prompts = streamer, [prompts]

    def put(self, value: Any) -> None:
        """Pass tokens on."""
        self.streamer.put(self.prompts.pop() if self.prompts else value)

    def end(self) -> None:
        """End the stream."""
        self.streamer.end()


@contextmanager
def ended_with_the_call(keywords: dict[str, Any]) -> Iterator[None]:
    """End the streamer among the keywords before any error leaves the call, KeyboardInterrupt included."""
    streamer = keywords.get("streamer")
    if isinstance(streamer, type) or not (
        hasattr(streamer, "put") and hasattr(streamer, "end")
    ):  # None, or refused with the other options
        yield
        return
    keywords["streamer"] = tracked = _Tracked(streamer)
    try:
        yield
    except BaseException:
        if not tracked.ended:
            _end(streamer)
        raise


def _end(streamer: Any) -> None:
    """End a streamer, and swallow its own errors: they must not replace the error that is being raised."""
    try:
        streamer.end()
    except Exception:
        # The text still held back cannot be decoded; signal the end to the reader all the same.
        try:
            streamer.on_finalized_text("", stream_end=True)
        except Exception:
            return
