"""Files that a command writes: over nothing but its own kind, and whole or not at all.

What this module does not do: it knows no format.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


def check_target(path: str, inputs: Sequence[str | int], what: str, is_ours: Callable[[Path], bool]) -> Path:
    """Where a file may be written: a new one, or one of the same kind that it replaces.

    Args:
        path: as it was given.
        inputs: paths and open descriptors of what must not be overwritten.
        what: the file's kind, for the sentences.
        is_ours: whether a regular file is of that kind.

    Raises:
        ValueError: it is one of the inputs, another kind of file, or in no folder that can be written to.

    >>> check_target("report.html", ["text.txt"], "page", is_page)
    PosixPath('/home/me/report.html')
    """
    if path in ("", "-"):
        raise ValueError(f"the {what} needs a file of its own, got {path!r}: give its name")
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise ValueError(f"the {what}'s folder {str(target.parent)!r} is not there: make it, or name another")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"the {what}'s folder {str(target.parent)!r} cannot be written to: name another")
    if not target.exists():
        return target
    if any(_is_same_file(target, source) for source in inputs):
        raise ValueError(
            f"the {what} must not overwrite what is read or printed to, and {path!r} is that: name another file"
        )
    if not target.is_file() or not is_ours(target):
        raise ValueError(
            f"the {what} replaces only a {what} that this command wrote, and {path!r} is something else: name another "
            "file, or move this one away"
        )
    return target


def write_whole(target: Path, content: str) -> None:
    """Write a file whole or not at all; what stood there is kept until then."""
    number, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".part")
    try:
        with open(number, "w", encoding="utf-8", newline="") as file:
            file.write(content)
        os.chmod(name, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _is_same_file(target: Path, source: str | int) -> bool:
    """Whether a path is a file that is open, or has another name."""
    try:
        return os.path.samestat(target.stat(), os.stat(source))
    except OSError:
        return False


def _umask() -> int:
    """The process' mask for new files, which can be read by setting it alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
