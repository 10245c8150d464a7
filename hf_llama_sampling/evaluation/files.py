"""Write a command's files: overwrite only files of the same kind, and write whole or not at all.

What this module does not do: it knows no format.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


def check_target(path: str, inputs: Sequence[str | int], what: str, is_ours: Callable[[Path], bool]) -> Path:
    """Check that a file may be written: it is new, or replaces one of the same kind. Return its path.

    Args:
        path: as the caller gave it.
        inputs: paths and open descriptors of files that must not be overwritten.
        what: the file's kind, for error messages.
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
    """Write a file whole or not at all; an existing file is kept until the new one is complete."""
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
    """Whether a path is the same file as another path or an open descriptor."""
    try:
        return os.path.samestat(target.stat(), os.stat(source))
    except OSError:
        return False


def _umask() -> int:
    """Return the process's mask for new files, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
