"""The files of a run: the output, and beside ``OUT.jsonl`` the run directory ``OUT.jsonl.run``.

    run.json      the manifest: the run's settings, its input, whether it is complete, a digest of its own output
    shard-00000   one per process: the responses so far, gone when the run is complete
    keys          of a complete output, 8 bytes a record: which record each line answers

The files get no wider permissions than the input has. This module runs no model, and knows processes by number only.
"""

import contextlib
import functools
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .jsonl import read_record
from .requests import InputIndex, Refused
from .shards import ERROR, Shard, ShardLine, explained, read_line_at, read_lines, repair

Existing = Literal["check", "reuse", "restart"]
ResumeState = Literal["new", "partial", "reuse", "complete"]
"""Responses that a run keeps from earlier ones: none ("new"), those in the shards, if any ("partial"), those of a
complete output, except its errors ("reuse"), or the whole output, with nothing left to do ("complete")."""

_CACHED = 90.0  # seconds after which a network file system shows every machine a new file


class Summary(NamedTuple):
    """The totals of a run.

    `records`, `errors` and `tokens` (generated, or scored) describe the whole output, whichever run made it; `answered`
    (the lines added, on all processes together) and `seconds` describe this run only.
    """

    records: int
    errors: int
    tokens: int
    answered: int
    seconds: float


class RunDirectory:
    """The output and the run directory of one run.

    Args:
        output: the output's path; links are followed.

    Raises:
        Refused: its folder does not exist, or the path names something that is not a file.
    """

    def __init__(self, output: str | os.PathLike[str]) -> None:
        self.output = Path(os.path.realpath(output))
        self.path = self.output.with_name(f"{self.output.name}.run")
        self.manifest_file = self.path / "run.json"
        self.keys_file = self.path / "keys"
        self.access = 0o777  # permission bits that its files may have
        if not self.output.parent.is_dir():
            raise Refused(f"the output's folder does not exist: {str(self.output.parent)!r}: create it")
        if self.output.exists() and not stat.S_ISREG(self.output.stat().st_mode):
            raise Refused(f'the output must be a file, and {str(self.output)!r} is none: name one, or "-"')

    def take_input(self, file: BinaryIO, name: object) -> None:
        """Refuse an input that the run would overwrite, under any name or link; record its permissions.

        Raises:
            Refused: `file` is the output itself or a file of the run.
        """
        status = os.fstat(file.fileno())
        for path in (self.output, *sorted(self.path.glob("*"))):
            with contextlib.suppress(OSError):
                if os.path.samestat(status, path.stat()):
                    raise Refused(
                        f"the output must not stand on the input, and {str(path)!r} is the input {str(name)!r}: name "
                        "another output"
                    )
        self.access = _access_of(status)

    def shards(self) -> list[Path]:
        """List all shards, including those of processes that this run lacks."""
        return sorted(self.path.glob("shard-*"))

    def open_shard(self, process: int) -> Shard:
        """Open and lock the shard of a process. The main process makes the directory and all files.

        Raises:
            OSError: another run has it, or it cannot be written.
        """
        with explained(f"the output {str(self.output)!r} cannot be written"):
            path = self._shard(process)
            if process == 0:
                self.path.mkdir(self.access, exist_ok=True)
                _restrict(self.path, self.access)
            elif not _appears(path):
                raise FileNotFoundError(
                    f"process {process} does not see {str(path)!r}, which process 0 made: name an output on a file "
                    "system that all machines share"
                )
            return Shard(path, self.access & 0o666)

    def _shard(self, process: int) -> Path:
        return self.path / f"shard-{process:05d}"

    # Existing files

    def resume_state(self, manifest: dict[str, Any], existing: Existing) -> ResumeState:
        """Inspect the existing files, and decide: start new, resume, reuse, or report complete.

        Without a manifest the state is "partial": `_refuse_foreign_files` has let pass only empty shards.

        Raises:
            Refused: it was not made with this input and these settings, or no run made it.
        """
        exists = self.output.exists()
        try:
            old = self._read_manifest()
        except Refused:
            if existing != "restart":
                raise
            old = None
        self._refuse_foreign_files(old)
        if existing == "restart":
            return "new"
        if old is None:
            return "partial"
        if not exists and not any(shard.stat().st_size for shard in self.shards()):
            return "new"
        self._check_same("settings", old, manifest, "made with other settings")
        whole_output = bool(old.get("complete")) and exists and self.output.stat().st_size == old["output_bytes"]
        if existing == "reuse":
            return "reuse" if whole_output else "partial"
        way_out = 'existing="reuse" (--existing reuse) keeps what still fits; '
        self._check_same("input", old, manifest, "made of another input", way_out)
        if not old.get("complete"):
            return "partial"
        return "complete" if exists else "new"

    def _refuse_foreign_files(self, old: dict[str, Any] | None) -> None:
        """Refuse files that no run made, since this run would replace or remove them."""
        if not self.manifest_file.exists():
            killed = self.manifest_file.with_name("run.json.new")  # left by a run that was killed at its start
            found = [path for path in self.path.glob("*") if path != killed]
            unknown = [path for path in found if not path.match("shard-*") or path.stat().st_size]
            if unknown:
                raise Refused(
                    f"the folder {str(self.path)!r} is needed for the files of the run, and {unknown[0].name!r} in "
                    "it is not a run's: name another output, or move the folder away"
                )
        if self.output.exists() and not self._is_ours(old):
            raise Refused(
                f"the output {str(self.output)!r} exists, and no run made it as it is: name another output, or move "
                "the file away"
            )

    def _is_ours(self, old: dict[str, Any] | None) -> bool:
        """Compare the output with the recorded digests, including one recorded before the final rename."""
        digests = (old or {}).get("outputs", [])
        return bool(digests) and _digest_of(self.output) in digests

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            old = json.loads(self.manifest_file.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            old = None
        if not isinstance(old, dict) or not all(isinstance(old.get(part), dict) for part in ("settings", "input")):
            raise Refused(
                f"{str(self.manifest_file)!r} should tell what the output was made of, but is corrupted: name another "
                'output, or start anew with existing="restart" (--existing restart)'
            )
        return old

    def _check_same(
        self, part: str, old: dict[str, Any], manifest: dict[str, Any], found: str, way_out: str = ""
    ) -> None:
        changes = describe_changes({part: old[part]}, {part: manifest[part]})
        if changes:
            raise Refused(
                f"the output {str(self.output)!r} was {found} ({changes}): name another output; {way_out}"
                'existing="restart" (--existing restart) replaces it'
            )

    # The work

    def prepare(self, manifest: dict[str, Any], state: ResumeState, *, own_shard: Path, processes: int) -> None:
        """Prepare the directory for so many processes; `own_shard` is the main process's, open and locked.

        Raises:
            BlockingIOError: another run has a shard open.
            ValueError: a shard is corrupted.
        """
        with explained(f"the output {str(self.output)!r} cannot be written"):
            for path in self.shards():
                if path != own_shard:
                    Shard(path).__exit__()
                if state == "new":
                    os.truncate(path, 0)
            if state == "reuse" and self.keys_file.exists():
                self._output_to_shard()
            for path in self.shards():
                repair(path)
            for process in range(processes):
                self._shard(process).touch(self.access & 0o666)
            for path in self.path.iterdir():
                _restrict(path, self.access)
            self._write_manifest({**manifest, "complete": False, "outputs": self._known_outputs()})

    def _output_to_shard(self) -> None:
        """Copy the responses of a complete output into a shard, without its errors."""
        keys = np.frombuffer(self.keys_file.read_bytes(), dtype="<u8")
        with open(self.output, "rb") as lines, self._replacing(self.path / "shard-earlier") as shard:
            for key, line in zip(keys, lines, strict=False):
                record = read_record(line)
                if "error" not in record:
                    tokens = record["tokens"] if "tokens" in record else record["prompt_tokens"]
                    shard.write(ShardLine(int(key), 0, len(tokens.value), line.rstrip(b"\n")).encode())

    def answered(self, index: InputIndex) -> bytes:
        """Return one byte per record: 1 if some shard holds its response."""
        done = bytearray(len(index))
        for path in self.shards():
            for _, line in read_lines(path):
                record = index.find(line.key)
                if record is not None:
                    done[record] = 1
        return bytes(done)

    def finish(self, manifest: dict[str, Any], index: InputIndex) -> Summary:
        """Merge the shards into the output, rename it into place, and remove the shards.

        Raises:
            FileNotFoundError: responses are missing.
            ValueError: a shard is corrupted.
        """
        shards = self.shards()
        which, where = np.full(len(index), -1, dtype=np.int32), np.zeros(len(index), dtype=np.int64)
        errors = tokens = 0
        for number, path in enumerate(shards):
            for offset, line in read_lines(path):
                record = index.find(line.key)
                if record is not None and which[record] < 0:
                    which[record], where[record] = number, offset
                    errors += line.tokens == ERROR
                    tokens += max(0, line.tokens)
        missing = int((which < 0).sum())
        if missing:
            raise FileNotFoundError(
                f"{missing} of {len(index)} answers are gone, so a shard in {str(self.path)!r} was removed or emptied "
                "during the run: the same command makes them again, and keeps the others"
            )
        with explained(f"the output {str(self.output)!r} cannot be written"):
            made, size = self._merge(manifest, shards, which, where)
            self._write(self.keys_file, index.keys.astype("<u8").tobytes())
            totals = {"complete": True, "outputs": [made], "output_bytes": size, "errors": errors, "tokens": tokens}
            self._write_manifest({**manifest, **totals})
        return self.clean_up()

    def _merge(
        self, manifest: dict[str, Any], shards: list[Path], which: NDArray[np.int32], where: NDArray[np.int64]
    ) -> tuple[str, int]:
        """Write the output, each line from its shard; record its digest before the rename. Return digest and size."""
        merged = self.path / "merged"
        with self._replacing(self.output, merged) as output, contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "rb")) for path in shards]
            for number, offset in zip(which, where, strict=True):
                output.write(read_line_at(shards[number], files[number], int(offset)).json + b"\n")
            output.flush()
            if self.output.exists():  # keep the permissions that its owner has set
                os.chmod(merged, stat.S_IMODE(self.output.stat().st_mode) & self.access)
            made = _digest_of(merged)
            self._write_manifest({**manifest, "complete": False, "outputs": [*self._known_outputs(), made]})
            return made, output.tell()

    def clean_up(self) -> Summary:
        """Remove the shards of a complete output; return its summary."""
        for path in self.shards():
            path.unlink(missing_ok=True)
        manifest = self._read_manifest()
        assert manifest is not None and manifest["complete"]
        return Summary(manifest["input"]["records"], manifest["errors"], manifest["tokens"], 0, 0.0)

    def _known_outputs(self) -> list[str]:
        """Read the digests of outputs that runs have written here."""
        with contextlib.suppress(Refused):
            return list((self._read_manifest() or {}).get("outputs", []))
        return []

    # Writing files whole

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        self._write(self.manifest_file, json.dumps(manifest, indent=1).encode() + b"\n")

    def _write(self, path: Path, content: bytes) -> None:
        with self._replacing(path) as file:
            file.write(content)

    @contextlib.contextmanager
    def _replacing(self, path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
        """Open a temporary file; sync it and rename it to `path` at the end, so that nobody sees it half-written."""
        temporary = temporary or path.with_name(f"{path.name}.new")
        temporary.unlink(missing_ok=True)  # a killed run's leftover: it may have wider permissions
        try:
            with open(temporary, "wb", opener=functools.partial(os.open, mode=self.access & 0o666)) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)  # free the space: the disk may be full
            raise
        os.replace(temporary, path)
        _sync(path.parent)


def describe_changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Describe the differences between two manifests."""
    return "; ".join(
        f"{name} was {old[part].get(name)!r} and is {new[part].get(name)!r}"
        for part in new
        for name in sorted({*old[part], *new[part]})
        if old[part].get(name) != new[part].get(name)
    )


def _access_of(status: os.stat_result) -> int:
    """Compute the permission bits for files made from an input: no wider than the input's."""
    mode = status.st_mode
    if not stat.S_ISREG(mode) or os.name != "posix":
        return 0o777
    group = mode & 0o004 or (mode & 0o040 and status.st_gid == os.getegid())
    return 0o700 | (0o070 if group else 0) | (0o007 if mode & 0o004 else 0)


def _restrict(path: Path, access: int) -> None:
    """Remove permissions that an earlier run set when more users could read the input."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & ~access & 0o777:
        os.chmod(path, mode & access)


def _appears(path: Path) -> bool:
    """Poll until the file is visible, at most 90 s (network file systems cache names). Return whether it is."""
    deadline = time.monotonic() + _CACHED
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _digest_of(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 16), b""):
            digest.update(block)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Sync a folder's entries to the disk, on POSIX; Windows needs no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
