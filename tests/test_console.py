"""Standard streams: terminals, pipes, encodings and interrupts, without a model."""

import io
import json
import signal
import sys

import pytest

from hf_llama_sampling import console

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\x9b31mc\u202egnp\u2066\r\x00\x7f\ttab\nline é 你 🙂"
SHOWN = r"a\x1b[2J\x1b]0;title\x07b\x9b31mc\u202egnp\u2066\r\x00\x7f" + "\ttab\nline é 你 🙂"


class Terminal(io.StringIO):
    """A stream with a person at the other end."""

    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard output a terminal, and returns it."""

    def make():
        monkeypatch.setattr(sys, "stdout", Terminal())
        return sys.stdout

    return make


@pytest.fixture
def pipe(monkeypatch):
    """Makes standard output a pipe of an encoding; returns its bytes."""

    def make(encoding):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, newline=""))
        return raw

    return make


def test_control_characters_are_shown_on_a_terminal(terminal):
    """Escapes, C0, C1, DEL and turns of direction are spelled out; tabs, lines, other scripts and emoji stay."""
    shown = terminal()
    console.write(HOSTILE)
    assert shown.getvalue() == SHOWN + "\n"


def test_every_control_character_is_shown(terminal):
    """None of the 65 but tab and line feed reaches a terminal as itself."""
    shown = terminal()
    console.write("".join(map(chr, [*range(32), *range(127, 160)])), end="")
    assert not {ord(character) for character in shown.getvalue()} & {*range(32), *range(127, 160)} - {9, 10}


def test_a_pipe_gets_the_text_as_it_is(pipe):
    """Whoever reads a pipe reads every character."""
    raw = pipe("utf-8")
    console.write(HOSTILE)
    assert raw.getvalue().decode() == HOSTILE + "\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "shift-jis", "utf-8", "utf-16"])
def test_json_survives_every_encoding(pipe, encoding):
    """A character that the encoding lacks is escaped by JSON's own rule: the record reads back."""
    raw = pipe(encoding)
    console.write_json({"text": HOSTILE})
    assert json.loads(raw.getvalue().decode(encoding)) == {"text": HOSTILE}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "shift-jis"])
def test_text_survives_every_encoding(pipe, encoding):
    """A character that the encoding lacks is spelled out, and nothing is lost after it."""
    raw = pipe(encoding)
    with console.standard_streams():
        console.write("é 你 🙂 end")
    assert raw.getvalue().decode(encoding).endswith(r"\U0001f642 end" + "\n")


def test_json_on_a_terminal_holds_no_control_character(terminal):
    """Its own escapes name them; the value is the same."""
    shown = terminal()
    console.write_json({"text": HOSTILE})
    line = shown.getvalue().removesuffix("\n")
    assert json.loads(line) == {"text": HOSTILE} and console.visible(line) == line


def test_messages_on_a_terminal_are_shown_too(monkeypatch):
    """A sentence may quote a text."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    console.say("got \x1b[31m")
    assert sys.stderr.getvalue() == r"got \x1b[31m" + "\n"


def test_streams_that_are_closed_or_stand_ins_are_no_terminals(monkeypatch):
    """None, an object without `isatty`, a closed file; nothing is printed where there is no standard error."""
    closed = io.StringIO()
    closed.close()
    assert not any(console.on_terminal(stream) for stream in (None, object(), closed, io.StringIO()))
    monkeypatch.setattr(sys, "stderr", None)
    console.say("unheard")
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(ValueError, match="standard output, and it is closed"):
        console.check_stdout("complete")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"one\ntwo\n", "one\ntwo"),
        (b"one\r\ntwo\r\n", "one\r\ntwo"),
        (b"one\n\n", "one\n"),
        (b"", ""),
        ("\ufeffé".encode(), "é"),
        (b"no line end", "no line end"),
    ],
)
def test_a_file_is_one_text(content, text, tmp_path):
    """As it stands, without a mark of its encoding and without the one line end at its end."""
    (tmp_path / "prompt.txt").write_bytes(content)
    assert console.read_file(str(tmp_path / "prompt.txt")) == text


def test_what_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    """A missing file, a folder, bytes of another encoding in a file and on standard input."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for path, words in ((tmp_path / "none", "check the path"), (tmp_path, "cannot be read"), ("latin.txt", "0xe9")):
        with pytest.raises(ValueError, match=words):
            console.read_file(str(tmp_path / path))
    with pytest.raises(ValueError, match=r"standard input must be text in utf-8.*0xe9"):
        list(console.read_lines(io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")))


def test_warnings_of_ours_are_one_line(capsys):
    """Without a path of the program's."""
    with console.standard_streams():
        import warnings

        warnings.simplefilter("always")
        warnings.warn("take care", stacklevel=1)
    assert capsys.readouterr().err == "hf-llama-sampling: take care\n"


def test_interrupt_handlers_are_put_back():
    """After the imports Ctrl-C is a KeyboardInterrupt again; a handler of the caller's is left alone."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the background
    try:
        with console.exit_on_interrupt():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with console.exit_on_interrupt():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, found)


def test_bars_are_shown_on_a_terminal_only(monkeypatch):
    """Whoever makes them, and whether or not they ask to be shown; afterwards all is as it was."""
    from tqdm.auto import tqdm

    shown = {}
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with console.bars_on_terminals():
            list(tqdm(range(3), disable=False))
        shown[type(stream)] = stream.getvalue()
    assert shown[io.StringIO] == "" and "3/3" in shown[Terminal]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    list(tqdm(range(3)))
    assert "3/3" in sys.stderr.getvalue()
