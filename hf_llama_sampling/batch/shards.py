"""Shards: files of responses, one per process, to which whole batches are appended, and which survive any end of a run.

A line is ``key crc left tokens json``, where `left` counts the lines of its batch that follow. A batch is on the disk
when `append` returns; `repair` removes a batch that was cut short. This module handles one file at a time.
"""

import contextlib
import errno
import functools
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .requests import Response

try:
    import fcntl
except ImportError:  # on Windows, two runs into one output are not detected
    fcntl = None  # type: ignore[assignment]

ERROR = -1  # in place of a token count


class ShardLine(NamedTuple):
    """A response in a shard: its record's key, how many lines of its batch follow, its tokens or `ERROR`, its JSON."""

    key: int
    left: int
    tokens: int
    json: bytes

    def encode(self) -> bytes:
        """Encode the line with its checksum and newline."""
        key, body = b"%016x" % self.key, b"%d %d %s" % (self.left, self.tokens, self.json)
        return b"%s %08x %s\n" % (key, zlib.crc32(key + body), body)


def decode(line: bytes) -> ShardLine | None:
    """Decode a shard's line; None if it is incomplete or changed."""
    pieces = line.split(b" ", 2)
    try:
        key, body = pieces[0], pieces[2][:-1]
        if not line.endswith(b"\n") or b"%08x" % zlib.crc32(key + body) != pieces[1]:
            return None
        left, tokens, text = body.split(b" ", 2)
        return ShardLine(int(key, 16), int(left), int(tokens), text)
    except (ValueError, IndexError):
        return None


class Shard:
    """A shard, open for appending by one process, and locked until the process closes it or ends in any way.

    Args:
        path: the file; created if missing.
        mode: permission bits of a new file, before the umask.

    Raises:
        BlockingIOError: another run has it open.
    """

    def __init__(self, path: Path, mode: int = 0o666) -> None:
        self.path = path
        self.file = open(path, "ab", buffering=0, opener=functools.partial(os.open, mode=mode))  # noqa: SIM115
        if not _lock(self.file):
            self.file.close()
            raise BlockingIOError(
                f"another run is writing this output ({str(path)!r} is in use): wait for its end, or stop it first"
            )

    def __enter__(self) -> "Shard":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, keys: Sequence[int], responses: Sequence[Response]) -> None:
        """Append the responses of a batch, all or none: they are on the disk when this returns.

        Raises:
            OSError: they could not be written, or the file has been removed.
        """
        lines = (
            ShardLine(key, left, response.tokens if response.error is None else ERROR, response.json).encode()
            for key, left, response in zip(keys, reversed(range(len(keys))), responses, strict=True)
        )
        rest = memoryview(b"".join(lines))
        with explained(f"answers cannot be written to {str(self.path)!r}"):
            while rest:
                rest = rest[self.file.write(rest) or 0 :]
            os.fsync(self.file.fileno())
            if not self.path.exists():
                raise FileNotFoundError(
                    f"the shard {str(self.path)!r} was removed during the run: the same command makes its answers "
                    "again, and keeps those of the other shards"
                )


def _lock(file: Any) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)  # other errors: the file system has no locks
    return True


def read_lines(path: Path) -> Iterator[tuple[int, ShardLine]]:
    """Yield the lines of a repaired shard, each with its offset.

    Raises:
        ValueError: the shard is corrupted.
    """
    offset = 0
    with open(path, "rb") as file:
        for text in file:
            line = decode(text)
            if line is None:
                raise _corrupted(path, offset)
            yield offset, line
            offset += len(text)


def read_line_at(path: Path, file: BinaryIO, offset: int) -> ShardLine:
    """Read the line at an offset.

    Raises:
        ValueError: the shard is corrupted there.
    """
    file.seek(offset)
    line = decode(file.readline())
    if line is None:
        raise _corrupted(path, offset)
    return line


def repair(path: Path) -> None:
    """Truncate after the last whole batch: a killed process or a full disk may leave an incomplete one.

    Raises:
        ValueError: a line before the end is broken.
    """
    whole_until = offset = 0
    broken: int | None = None
    with open(path, "r+b") as file:
        for text in file:
            line = decode(text)
            if line is None:
                broken = offset if broken is None else broken
            elif broken is not None:
                raise _corrupted(path, broken)
            offset += len(text)
            if line is not None and line.left == 0:
                whole_until = offset
        if whole_until < offset:
            file.truncate(whole_until)
            os.fsync(file.fileno())


def _corrupted(path: Path, offset: int) -> ValueError:
    return ValueError(
        f"the shard {str(path)!r} is corrupted at byte {offset}: restore it, or remove it, and the same command "
        "makes its answers again and keeps those of the other shards"
    )


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Reword the system's errors in one sentence with a way out; pass our own on."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        ways_out = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some space",
            errno.EFBIG: "raise the limit on file sizes",
            errno.EROFS: "name an output where files can be written",
            errno.EACCES: "name an output where files can be written",
            errno.EPERM: "name an output where files can be written",
        }
        way_out = ways_out.get(error.errno, "see to that")
        raise OSError(
            f"{what}: {error.strerror}: {way_out} and give the same command again, which keeps what was answered so far"
        ) from error
