"""Show a run while it works: responses on a stream, in the input's order, and a progress bar.

This module keeps nothing: `store` and `shards` do.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from .requests import Refused, Response
from .shards import decode


class ReorderBuffer:
    """Writes responses to a stream in the input's order, each as soon as all earlier ones are written."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.held: dict[int, bytes] = {}
        self.next = self.errors = self.tokens = 0

    def put(self, responses: Sequence[Response]) -> None:
        """Add responses, and write those whose turn has come."""
        for response in responses:
            self.held[response.index] = response.json
            self.errors += response.error is not None
            self.tokens += response.tokens
        while self.next in self.held:
            self.stream.write(self.held.pop(self.next) + b"\n")
            self.next += 1
        self.stream.flush()


class Progress:
    """Progress bar on standard error: records of all processes, and their tokens per second.

    Args:
        total, done: number of records, and of those answered before.
        others: the shards of the other processes, read as they grow.
        shown: whether to show a bar.
    """

    def __init__(self, total: int, done: int, others: Sequence[Path], *, shown: bool) -> None:
        self.bar = tqdm(total=total, initial=done, unit="record", dynamic_ncols=True) if shown else None
        self.read = {path: path.stat().st_size for path in others} if shown else {}
        self.tokens = 0
        self.start = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, responses: Sequence[Response]) -> None:
        """Count these responses, and those that other processes have added since the last call."""
        if self.bar is None:
            return
        found = [response.tokens for response in responses]
        for path, offset in self.read.items():
            with contextlib.suppress(OSError), open(path, "rb") as file:
                file.seek(offset)
                for text in file:
                    line = decode(text)
                    if line is None:  # not complete yet
                        break
                    self.read[path] += len(text)
                    found.append(max(0, line.tokens))
        self.tokens += sum(found)
        self.bar.update(len(found))
        self.bar.set_postfix_str(f"{self.tokens / (time.monotonic() - self.start):.0f} tokens/s")


def standard_bytes(name: str) -> Any:
    """Return `stdin` or `stdout` as a stream of bytes, whatever its text encoding.

    Raises:
        Refused: it is closed.
    """
    stream = getattr(sys, name)
    if stream is None:
        said = "standard input" if name == "stdin" else "standard output"
        raise Refused(f"{said} is closed: open it, or name a file")
    return getattr(stream, "buffer", None) or _Utf8(stream)


class _Utf8:
    """A stream of bytes over one that takes only text, as in notebooks."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def read(self, size: int = -1) -> bytes:
        return str(self.stream.read(size)).encode()

    def write(self, content: bytes) -> int:
        self.stream.write(content.decode())
        return len(content)

    def flush(self) -> None:
        self.stream.flush()
