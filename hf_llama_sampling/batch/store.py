"""Answers on their way out: to a stream, or to files that survive whatever ends a run, and are merged in the end.

Beside ``OUT.jsonl`` stands a folder ``OUT.jsonl.run``::

    run.json     what the run is: its settings, its input, whether it is complete
    part-00000   one per process; a line per answer, appended and synced batch by batch, gone when the run is complete
    keys         of a complete output, 8 bytes a record: which record each line answers

What this module does not do: it knows neither model nor processes, but for one part file for each of these.
"""

import contextlib
import errno
import hashlib
import json
import os
import stat
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .requests import Refused, Survey

try:
    import fcntl
except ImportError:  # not on Windows; two runs into one output are then not told from one
    fcntl = None  # type: ignore[assignment]

Existing = Literal["check", "reuse", "restart"]

ERROR = -1  # in place of a token count
_CACHED = 90.0  # seconds after which a network file system shows every machine a new file


class Summary(NamedTuple):
    """What a run came to.

    `records` and `errors` count lines of the output, `tokens` those generated (or scored) for it, by whichever run;
    `answered` counts the lines that this run added, on all processes together, and `seconds` is what it took.
    """

    records: int
    errors: int
    tokens: int
    answered: int
    seconds: float


class Answer(NamedTuple):
    """A line of the output, and the tokens it cost; `ERROR` for an error record."""

    place: int
    record: dict[str, Any]
    tokens: int


class InOrder:
    """Lines for a stream, each as soon as all before it are there."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.held: dict[int, bytes] = {}
        self.next = self.errors = self.tokens = 0

    def put(self, answers: Sequence[Answer]) -> None:
        """Write what can be written."""
        for answer in answers:
            self.held[answer.place] = encoded(answer.record)
            self.errors += answer.tokens == ERROR
            self.tokens += max(0, answer.tokens)
        while self.next in self.held:
            self.stream.write(self.held.pop(self.next) + b"\n")
            self.next += 1
        self.stream.flush()


def encoded(record: dict[str, Any]) -> bytes:
    """A record as a line of JSON, readable where UTF-8 can hold it."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(record, allow_nan=False).encode()


class Line(NamedTuple):
    """A line of a part file: ``key crc left tokens json``. `left` counts the lines of its batch that follow it."""

    key: int
    left: int
    tokens: int
    json: bytes

    def packed(self) -> bytes:
        """With its checksum and newline."""
        body = b"%d %d %s" % (self.left, self.tokens, self.json)
        return b"%016x %08x %s\n" % (self.key, _checksum(self.key, body), body)


def _checksum(key: int, body: bytes) -> int:
    return zlib.crc32(body, key & 0xFFFFFFFF)


def unpacked(line: bytes) -> Line | None:
    """A part file's line, or None if it is not whole."""
    pieces = line.split(b" ", 2)
    try:
        key, checksum = int(pieces[0], 16), int(pieces[1], 16)
        if not line.endswith(b"\n") or _checksum(key, pieces[2][:-1]) != checksum:
            return None
        left, tokens, text = pieces[2][:-1].split(b" ", 2)
        return Line(key, int(left), int(tokens), text)
    except (ValueError, IndexError):
        return None


class Part:
    """A part file, open for one process to append to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115
        if not _lock(self.file):
            self.file.close()
            raise BlockingIOError(
                f"another run is writing this output ({str(path)!r} is in use): wait for its end, or stop it first"
            )

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, answers: Sequence[tuple[int, Answer]]) -> None:
        """Keep the answers of a batch, all or none of them: they are on the disk when this returns.

        Raises:
            OSError: they could not be written, or the file has been removed.
        """
        last = len(answers) - 1
        lines = [
            Line(key, last - i, answer.tokens, encoded(answer.record)).packed()
            for i, (key, answer) in enumerate(answers)
        ]
        rest = memoryview(b"".join(lines))
        with _explained(f"answers cannot be written to {str(self.path)!r}"):
            while rest:
                rest = rest[self.file.write(rest) or 0 :]
            os.fsync(self.file.fileno())
            if not self.path.exists():
                raise FileNotFoundError(
                    f"the part file {str(self.path)!r} was removed during the run: the same command makes its answers "
                    "again, and keeps those of the other part files"
                )


def _lock(file: BinaryIO | Any) -> bool:
    """Whether this process has the file for itself, until it closes the file or ends, however it ends."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)  # else the file system has no locks
    return True


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """The system's errors in one sentence with a way out; ours pass."""
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


class RunFolder:
    """The files of a run: the output, and the folder beside it."""

    def __init__(self, output: str | Path) -> None:
        self.output = Path(os.path.realpath(output))
        self.folder = self.output.with_name(f"{self.output.name}.run")
        self.claim_file = self.folder / "run.json"
        self.keys_file = self.folder / "keys"
        if not self.output.parent.is_dir():
            raise Refused(f"the output's folder does not exist: {str(self.output.parent)!r}: create it")
        if self.output.exists() and not stat.S_ISREG(self.output.stat().st_mode):
            raise Refused(f'the output must be a file, and {str(self.output)!r} is none: name one, or "-"')

    def refuse_input(self, file: BinaryIO, name: object) -> None:
        """Refuse an input that the run would write over: the output itself, by whatever name, or a file of the run.

        Raises:
            Refused: `file` is one of them.
        """
        status = os.fstat(file.fileno())
        for path in (self.output, *sorted(self.folder.glob("*"))):
            with contextlib.suppress(OSError):
                if os.path.samestat(status, path.stat()):
                    raise Refused(
                        f"the output must not stand on the input, and {str(path)!r} is the input {str(name)!r}: name "
                        "another output"
                    )

    def parts(self) -> list[Path]:
        """All part files, also those of processes that this run does not have."""
        return sorted(self.folder.glob("part-*"))

    def open_part(self, process: int) -> "Part":
        """The part file of a process; only one run may have it. The main process makes the folder and all files in it.

        Raises:
            OSError: another run has it, or it cannot be written.
        """
        with _explained(f"the output {str(self.output)!r} cannot be written"):
            path = self.folder / f"part-{process:05d}"
            if process == 0:
                self.folder.mkdir(exist_ok=True)
            elif not _comes_to_be(path):
                raise FileNotFoundError(
                    f"process {process} does not see {str(path)!r}, which process 0 made: name an output on a file "
                    "system that all machines share"
                )
            return Part(path)

    def standing(self, claim: dict[str, Any], existing: Existing) -> Literal["new", "kept", "reused", "complete"]:
        """What there is of this output already, and what is to become of it.

        Raises:
            Refused: it was not made with this input and these settings.
        """
        exists = self.output.exists()
        try:
            old = self._old_claim()
        except Refused:
            if existing != "restart":
                raise
            old = None
        self._refuse_foreign_files(old)
        if existing == "restart":
            return "new"
        if old is None:
            return "kept"
        if not exists and not any(part.stat().st_size for part in self.parts()):
            return "new"
        self._check_same("settings", old, claim, "made with other settings")
        whole_output = bool(old.get("complete")) and exists and self.output.stat().st_size == old["output_bytes"]
        if existing == "reuse":
            return "reused" if whole_output else "kept"
        self._check_same(
            "input", old, claim, "made of another input", 'existing="reuse" (--existing reuse) keeps what still fits; '
        )
        if not old.get("complete"):
            return "kept"
        if not exists:
            return "new"
        return "complete"

    def _refuse_foreign_files(self, old: dict[str, Any] | None) -> None:
        """Refuse to write over anything that no run made: a run replaces its own output and its own folder only."""
        if not self.claim_file.exists():
            unknown = [path for path in self.folder.glob("*") if not path.match("part-*") or path.stat().st_size]
            if unknown:
                raise Refused(
                    f"the folder {str(self.folder)!r} is needed for the files of the run, and {unknown[0].name!r} in "
                    "it is not a run's: name another output, or move the folder away"
                )
        if self.output.exists() and not self._is_ours(old):
            raise Refused(
                f"the output {str(self.output)!r} exists, and no run made it as it is: name another output, or move "
                "the file away"
            )

    def _is_ours(self, old: dict[str, Any] | None) -> bool:
        """Whether the output holds the very bytes that the run wrote, or was about to write when it was killed."""
        digests = (old or {}).get("outputs", [])
        return bool(digests) and _digest_of(self.output) in digests

    def _old_claim(self) -> dict[str, Any] | None:
        try:
            old = json.loads(self.claim_file.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            old = None
        if not isinstance(old, dict) or not isinstance(old.get("settings"), dict):
            raise Refused(
                f"{str(self.claim_file)!r} should tell what the output was made of, but is corrupted: name another "
                'output, or start anew with existing="restart" (--existing restart)'
            )
        return old

    def _check_same(self, part: str, old: dict[str, Any], claim: dict[str, Any], found: str, way_out: str = "") -> None:
        found_changes = changes({part: old.get(part, {})}, {part: claim[part]})
        if found_changes:
            raise Refused(
                f"the output {str(self.output)!r} was {found} ({found_changes}): name another output; {way_out}"
                'existing="restart" (--existing restart) replaces it'
            )

    def prepare(self, claim: dict[str, Any], standing: str, *, mine: Path, processes: int) -> None:
        """Bring the folder into order for so many processes; `mine` is the main process's own, locked part file.

        Raises:
            Refused: another run is at work here.
            ValueError: a part file is corrupted.
        """
        outputs: list[str] = []  # digests of what may stand there as the run's own output
        with contextlib.suppress(Refused):
            outputs = (self._old_claim() or {}).get("outputs", [])
        with _explained(f"the output {str(self.output)!r} cannot be written"):
            for path in self.parts():
                if path != mine:
                    Part(path).__exit__()
            if standing == "new":
                for path in self.parts():
                    os.truncate(path, 0)
            if standing == "reused" and self.keys_file.exists():
                self._reuse_output()
            for path in self.parts():
                repair(path)
            for process in range(processes):
                (self.folder / f"part-{process:05d}").touch()
            _write(self.claim_file, _pretty({**claim, "complete": False, "outputs": outputs}))

    def _reuse_output(self) -> None:
        """The answers of a complete output as a part file, without its errors."""
        keys = np.frombuffer(self.keys_file.read_bytes(), dtype="<u8")
        with open(self.output, "rb") as lines, _replacing(self.folder / "part-earlier") as part:
            for key, line in zip(keys, lines, strict=False):
                record = json.loads(line)
                if "error" not in record:
                    tokens = record.get("tokens", record.get("prompt_tokens", []))
                    part.write(Line(int(key), 0, len(tokens), line.rstrip(b"\n")).packed())

    def answered(self, survey: Survey) -> bytes:
        """One byte per record: whether some part file holds its answer."""
        done = bytearray(len(survey))
        for path in self.parts():
            for _, line in lines_of(path):
                place = survey.place(line.key)
                if place is not None:
                    done[place] = 1
        return bytes(done)

    def finish(self, claim: dict[str, Any], survey: Survey) -> Summary:
        """Merge the parts into the output, which appears at once, and let them go.

        Raises:
            FileNotFoundError: answers are missing.
            ValueError: a part file is corrupted.
        """
        paths = self.parts()
        which, where = np.full(len(survey), -1, dtype=np.int32), np.zeros(len(survey), dtype=np.int64)
        errors = tokens = 0
        for number, path in enumerate(paths):
            for offset, line in lines_of(path):
                place = survey.place(line.key)
                if place is not None and which[place] < 0:
                    which[place], where[place] = number, offset
                    errors += line.tokens == ERROR
                    tokens += max(0, line.tokens)
        missing = int((which < 0).sum())
        if missing:
            raise FileNotFoundError(
                f"{missing} of {len(survey)} answers are gone, so a part file in {str(self.folder)!r} was removed or "
                "emptied during the run: the same command makes them again, and keeps the others"
            )
        with _explained(f"the output {str(self.output)!r} cannot be written"):
            with _replacing(self.output, self.folder / "merged") as merged:
                self._merge(merged, paths, which, where)
                merged.flush()
                made, size = _digest_of(self.folder / "merged"), merged.tell()
                outputs = [*(self._old_claim() or {}).get("outputs", []), made]
                _write(self.claim_file, _pretty({**claim, "complete": False, "outputs": outputs}))
            _write(self.keys_file, survey.keys.astype("<u8").tobytes())
            found = {"complete": True, "outputs": [made], "output_bytes": size, "errors": errors, "tokens": tokens}
            _write(self.claim_file, _pretty({**claim, **found}))
        return self.finished()

    def _merge(self, merged: BinaryIO, paths: list[Path], which: NDArray[np.int32], where: NDArray[np.int64]) -> None:
        """Reads here and there, though within a window: parts are in the order of work."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "rb")) for path in paths]
            for number, offset in zip(which, where, strict=True):
                files[number].seek(int(offset))
                line = unpacked(files[number].readline())
                if line is None:
                    raise corrupted(paths[number], int(offset))
                merged.write(line.json + b"\n")

    def finished(self) -> Summary:
        """The summary of a complete output, whose part files are removed."""
        for path in self.parts():
            path.unlink(missing_ok=True)
        claim = self._old_claim()
        assert claim is not None and claim["complete"]
        return Summary(claim["input"]["records"], claim["errors"], claim["tokens"], 0, 0.0)


def changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """In words, what differs in two claims."""
    return "; ".join(
        f"{name} was {old[part].get(name)!r} and is {new[part].get(name)!r}"
        for part in new
        for name in sorted({*old[part], *new[part]})
        if old[part].get(name) != new[part].get(name)
    )


def _comes_to_be(path: Path) -> bool:
    """Whether there is such a file, now or soon."""
    patience = time.monotonic() + _CACHED
    while not path.exists():
        if time.monotonic() > patience:
            return False
        time.sleep(0.1)
    return True


def lines_of(path: Path) -> Iterator[tuple[int, Line]]:
    """The lines of a repaired part file, each with where it begins."""
    offset = 0
    with open(path, "rb") as file:
        for text in file:
            line = unpacked(text)
            if line is None:
                raise corrupted(path, offset)
            yield offset, line
            offset += len(text)


def repair(path: Path) -> None:
    """Cut off what follows the last whole batch: the torn end that a killed process or a full disk leaves.

    Raises:
        ValueError: what is broken is not the end.
    """
    whole_until = offset = 0
    broken: int | None = None
    with open(path, "r+b") as file:
        for text in file:
            line = unpacked(text)
            if line is None:
                broken = offset if broken is None else broken
            elif broken is not None:
                raise corrupted(path, broken)
            offset += len(text)
            if line is not None and line.left == 0:
                whole_until = offset
        if whole_until < offset:
            file.truncate(whole_until)
            os.fsync(file.fileno())


def corrupted(path: Path, offset: int) -> ValueError:
    """The error for a part file that something else than this program has changed."""
    return ValueError(
        f"the part file {str(path)!r} is corrupted at byte {offset}: restore it, or remove it, and the same command "
        "makes its answers again and keeps those of the other part files"
    )


@contextlib.contextmanager
def _replacing(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """A file that takes its name at once, when it is whole and on the disk."""
    temporary = temporary or path.with_name(f"{path.name}.new")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it is in the way
        raise
    os.replace(temporary, path)
    _sync(path.parent)


def _digest_of(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 16), b""):
            digest.update(block)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Names in a folder are kept like its files; Windows does so by itself."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    with _replacing(path) as file:
        file.write(content)


def _pretty(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


class Progress:
    """A bar on standard error, if it is shown: records of all processes, and their tokens per second."""

    def __init__(self, total: int, done: int, others: list[Path], *, shown: bool) -> None:
        self.bar = tqdm(total=total, initial=done, unit="record", disable=not shown, dynamic_ncols=True)
        self.read = {path: path.stat().st_size for path in others}
        self.tokens = 0
        self.start = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, answers: Sequence[Answer]) -> None:
        """Count these, and what other processes have added since."""
        if self.bar.disable:
            return
        found = [answer.tokens for answer in answers]
        for path, offset in self.read.items():
            with contextlib.suppress(OSError), open(path, "rb") as file:
                file.seek(offset)
                for text in file:
                    line = unpacked(text)
                    if line is None:  # being written
                        break
                    self.read[path] += len(text)
                    found.append(line.tokens)
        self.tokens += sum(max(0, tokens) for tokens in found)
        self.bar.update(len(found))
        self.bar.set_postfix_str(f"{self.tokens / (time.monotonic() - self.start):.0f} tokens/s")
