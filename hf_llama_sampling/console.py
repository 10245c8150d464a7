"""Standard streams: how the commands read texts and print them, on a terminal and in a pipe.

On a terminal, control characters of a text are shown and not obeyed; in a pipe a text is printed as it is. What this
module does not do: it knows no model.
"""

import contextlib
import json
import os
import re
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

# C0 but for tab and line feed, DEL, C1, and the characters that turn the direction of the text after them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_JSON_UNSAFE = re.compile("[\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # the rest is escaped by JSON's own rules
_LINE = 100  # characters


def on_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads or writes at the other end; a stream that is closed, or a stand-in, has nobody."""
    isatty = getattr(stream, "isatty", None)
    with contextlib.suppress(ValueError):  # closed
        return isatty is not None and bool(isatty())
    return False


def visible(text: str) -> str:
    r"""A text whose control characters and turns of direction are spelled out.

    >>> visible("a\x1b[2J\u202eb")
    'a\\x1b[2J\\u202eb'
    """
    return _UNSAFE.sub(lambda found: repr(found[0])[1:-1], text)


def say(text: str) -> None:
    """Print a line on standard error, if there is one."""
    if sys.stderr is not None:
        print(visible(text) if on_terminal(sys.stderr) else text, file=sys.stderr, flush=True)


def write(text: str, end: str = "\n") -> None:
    """Print a text on standard output at once."""
    print(visible(text) if on_terminal(sys.stdout) else text, end=end, flush=True)


def write_json(record: Any) -> None:
    """Print a record as one line of JSON; characters that the stream's encoding lacks are escaped."""
    line = json.dumps(record, ensure_ascii=False)
    if on_terminal(sys.stdout):
        line = _JSON_UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", line)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(record)
    print(line, flush=True)


def write_logprobs(tokens: Sequence[str], logprobs: Sequence[float]) -> None:
    """Print each token with its logprob after it, as many to a line as fit."""
    pairs = (f"{token!r}\u00a0{value:.4f}" for token, value in zip(tokens, logprobs, strict=True))
    # No-break spaces hold a pair together; a token's own blanks are kept by the same trick.
    joined = "  ".join(pair.replace(" ", "\u00a0") for pair in pairs)
    lines = textwrap.wrap(joined, width=_LINE, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    write("\n".join(lines).replace("\u00a0", " "))


def write_table(tokens: Sequence[str], columns: Mapping[str, Sequence[float]]) -> None:
    """Print a line per token, with a column of numbers for each name."""
    width = max((len(repr(token)) for token in tokens), default=0)
    names = [name.replace("_", " ") for name in columns]
    write("  " + " " * width + "".join(f"  {name}" for name in names))
    for token, values in zip(tokens, zip(*columns.values(), strict=True), strict=True):
        numbers = "".join(f"  {value:{len(name)}.4f}" for name, value in zip(names, values, strict=True))
        write(f"  {token!r:{width}}{numbers}")


def write_named(tokens: Sequence[str], names: Sequence[str], found: Sequence[Sequence[tuple[int, float, int]]]) -> None:
    """Print a line per token, with the logprob and the rank of each named token."""
    named = [
        "".join(f"  {name} {value:.4f} #{rank}" for name, (_, value, rank) in zip(names, place, strict=False))
        for place in found
    ]
    _write_lines(tokens, named)


def write_best(tokens: Sequence[str], found: Sequence[Sequence[tuple[str, float]]]) -> None:
    """Print a line per token, with the best tokens in its place and their logprobs."""
    _write_lines(tokens, ["".join(f"  {name!r} {value:.4f}" for name, value in place) for place in found])


def _write_lines(tokens: Sequence[str], lines: Sequence[str]) -> None:
    width = max((len(repr(token)) for token in tokens), default=0)
    for token, line in zip(tokens, lines, strict=True):
        write(f"  {token!r:{width}}{line}")


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Escape characters that standard output's encoding lacks, print our warnings as one line each, and flush."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if category is UserWarning:
                say(f"hf-llama-sampling: {message}")
            else:
                shown(message, category, *place, **more)

        warnings.showwarning = show
        yield
    if sys.stdout is not None:
        sys.stdout.flush()


def check_stdout(command: str) -> None:
    """Refuse to run with standard output closed: the answers would be lost."""
    if sys.stdout is None:
        raise ValueError(f"{command} prints its answers on standard output, and it is closed: open it")


def leave_stdout() -> None:
    """After an error: if no more can be written, drop the rest, or the interpreter complains of it when it ends."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_lines(stream: TextIO) -> Iterator[str]:
    """The lines of a stream without their ends.

    Raises:
        ValueError: a byte that is not of the stream's encoding.
    """
    while True:
        try:
            line = stream.readline()
        except UnicodeDecodeError as error:
            raise _wrong_encoding("standard input", error) from error
        if not line:
            return
        yield line.rstrip("\r\n")


def read_file(path: str) -> str:
    """A whole file, "-" for standard input, as one text in UTF-8; the line end at its end is no part of it.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        content = _stdin_bytes() if path == "-" else Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"the file {path!r} cannot be read: {error.strerror}: check the path") from error
    except UnicodeDecodeError as error:
        raise _wrong_encoding(f"the file {path!r}", error) from error
    return text.removesuffix("\n").removesuffix("\r")


def _stdin_bytes() -> bytes:
    """All of standard input; a stand-in for it may hold text alone."""
    if sys.stdin is None:
        raise ValueError("standard input is closed: open it, or name a file")
    raw: Any = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read().encode() if raw is None else bytes(raw.read())


def _wrong_encoding(name: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"{name} must be text in {error.encoding}, and its byte {error.object[error.start]:#04x} is not: convert it"
    )


@contextlib.contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once, status 130: for imports, where an exception can be lost or printed."""

    def leave(number: int, frame: object) -> None:
        os.write(2, b"\n")
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    try:
        signal.signal(signal.SIGINT, leave)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Nowhere:
    """A text file that keeps nothing."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Libraries' progress bars by tqdm, whoever makes them, go to a terminal's standard error, and nowhere else."""
    from tqdm import tqdm

    if on_terminal(sys.stderr):
        yield
        return
    shown = tqdm.__init__

    def hidden(bar: Any, *arguments: Any, **options: Any) -> None:
        shown(bar, *arguments, **{**options, "disable": True})

    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = shown


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Bars and notices of loading go to a terminal's standard error, and nowhere else."""
    terminal = on_terminal(sys.stderr)
    if not terminal:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
    target: Any = sys.stderr if terminal else Nowhere()
    with contextlib.redirect_stdout(target), bars_on_terminals():
        yield


@contextlib.contextmanager
def progress(tokens: int) -> Iterator[Any]:
    """A streamer that shows a bar of decoding steps on a terminal's standard error, after two seconds."""
    from tqdm import tqdm

    class Steps:
        def __init__(self, bar: Any) -> None:
            self.bar = bar
            self.started = False

        def put(self, value: object) -> None:
            self.bar.update(self.started)  # the first call is the prompt
            self.started = True

        def end(self) -> None:
            self.bar.close()

    with tqdm(total=tokens, unit="step", disable=None if sys.stderr else True, delay=2.0, leave=False) as bar:
        yield Steps(bar)
