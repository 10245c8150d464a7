"""What a JSONL input says: its lines as records, and by what a record is known, whatever line it stands in.

What this module does not do: it asks no model, and it writes nothing.
"""

import hashlib
import json
import math
import os
from array import array
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


class Refused(ValueError):
    """The run is refused, or stopped by `strict`, for a reason that every process of it sees alike."""


def parse(line: bytes) -> dict[str, Any]:
    """One line as a record, without the fields that are null.

    Raises:
        ValueError: it is not one JSON object, or not JSON by the book: nan, infinity, a name twice.
    """
    try:
        record = json.loads(
            line.decode("utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("a record must be a flat JSON object, and this is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"a record must be UTF-8, and this line is not, at byte {error.start}: convert it") from None
    except json.JSONDecodeError as error:
        what = f"{error.msg} at character {error.pos + 1}" if line.strip() else "it is empty"
        raise ValueError(f"a line must hold one JSON object: {what}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a line must hold one JSON object, and this holds a {type(record).__name__}")
    return {name: value for name, value in record.items() if value is not None}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"a JSON object names each field once, and this names {_twice(names)!r} twice: drop one")
    return record


def _twice(names: list[str]) -> str:
    return next(name for place, name in enumerate(names) if name in names[:place])


def _no_constant(name: str) -> Any:
    raise ValueError(f"JSON has no {name}: give a number or null")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"numbers must be finite, got {text}")
    return number


def content(line: bytes) -> bytes:
    """What a record says, whatever its spacing and the order of its fields; a line that is no record, as it is."""
    try:
        return canonical(parse(line)).encode()
    except ValueError:
        return b"!" + line.strip()


def hash64(*parts: object) -> int:
    """64 bits that depend on every part, and are the same everywhere and always."""
    text = b"\0".join(part if isinstance(part, bytes) else str(part).encode() for part in parts)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


class Survey:
    """A first pass over the input: how many records there are, and by what they are known.

    `keys` (uint64, one per record) depends on a record's content, the settings, and how many equal ones come before it
    (`repeats`, int32). Nothing depends on line numbers.

    Raises:
        Refused: two different records have one key (one chance in a million, for six million records).
    """

    def __init__(self, file: BinaryIO, settings: dict[str, Any]) -> None:
        salt, whole_input, size = canonical(settings), hashlib.blake2b(digest_size=16), 0
        digests = array("Q")
        file.seek(0)
        for line in file:
            digests.append(hash64(salt, content(line)))
            whole_input.update(line)
            size += len(line)
        keys: NDArray[np.uint64] = np.array(digests, dtype=np.uint64)
        self.repeats = _repeats(keys)
        for place in np.flatnonzero(self.repeats):
            keys[place] = hash64(int(keys[place]), int(self.repeats[place]))
        self.keys = keys
        self.order = np.argsort(keys, kind="stable")
        self.sorted = keys[self.order]
        if bool((self.sorted[1:] == self.sorted[:-1]).any()):
            raise Refused("two different records have the same 64-bit key: split the input in two")
        self.description = {"records": len(keys), "bytes": size, "blake2b": whole_input.hexdigest()}
        self.stamp = _stamp(file)

    def check_unchanged(self, file: BinaryIO) -> None:
        """Nobody writes to the input while it is read.

        Raises:
            ValueError: it is not as it was in the first pass.
        """
        if _stamp(file) != self.stamp:
            raise ValueError("the input was changed during the run: start again with a file that stays as it is")

    def __len__(self) -> int:
        return len(self.keys)

    def place(self, key: int) -> int | None:
        """Where the record with this key stands, or None if there is none."""
        index = int(np.searchsorted(self.sorted, np.uint64(key)))
        return int(self.order[index]) if index < len(self.sorted) and int(self.sorted[index]) == key else None


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _repeats(digests: NDArray[np.uint64]) -> NDArray[np.int32]:
    """For each value how many equal ones stand before it: [7, 5, 7, 7] -> [0, 0, 1, 2]."""
    order = np.argsort(digests, kind="stable")
    ranks = np.arange(len(order))
    ordered = digests[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = ordered[1:] != ordered[:-1]
    repeats = np.empty(len(order), dtype=np.int32)
    repeats[order] = ranks - np.maximum.accumulate(np.where(first, ranks, 0))
    return repeats
