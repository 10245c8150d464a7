"""Scores on a terminal and in a pipe."""

import io
import re
import sys

import pytest

from hf_llama_sampling import Llama, Tokenizer
from hf_llama_sampling.evaluation import terminal
from hf_llama_sampling.evaluation.levels import NAMES
from hf_llama_sampling.evaluation.perplexity import score_texts
from tests.conftest import TINY
from tests.test_console import Terminal

TEXT = "ROMEO:\nBut soft, what \x1b[2J \u4f60"


@pytest.fixture(scope="module")
def scored(tiny_model):
    """One text."""
    return score_texts(Llama(tiny_model, Tokenizer(TINY / "tokenizer.model")), [("a.txt", TEXT)])


def plain(text):
    """A text without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_terminal_shows_colours(scored, monkeypatch):
    """The text with its control characters spelled out, in the colours of its levels; and what they mean."""
    monkeypatch.setattr(sys, "stdout", Terminal())
    for name, value in (("TERM", "xterm-256color"), ("COLORTERM", "truecolor")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal.write_scores(scored)
    shown = sys.stdout.getvalue()
    assert plain(shown).startswith(TEXT.replace("\x1b", "\\x1b") + "\n")
    assert "48;2;179;38;30m" in shown and all(f" {name} " in plain(shown) for name in NAMES)


def test_a_pipe_gets_plain_text(scored, monkeypatch):
    """The text as it is, and figures without colours."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    terminal.write_scores(scored)
    shown = sys.stdout.getvalue()
    assert shown.startswith(TEXT + "\n") and "\x1b" not in shown[len(TEXT) :] and NAMES[0] not in shown
    assert f"perplexity per token  {scored[0].perplexity.per_token:.4f}" in shown


def test_without_rich_a_terminal_gets_plain_text_and_one_sentence(scored, monkeypatch, capsys):
    """The sentence says what to install, and comes once."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys, "stdout", Terminal())
    terminal._say_what_is_missing.cache_clear()
    terminal.write_scores(scored)
    assert sys.stdout.getvalue().startswith(TEXT.replace("\x1b", "\\x1b")) and "\x1b" not in sys.stdout.getvalue()
    assert capsys.readouterr().err == "colours need rich: pip install rich\n"


@pytest.mark.parametrize(
    ("text", "tokens", "coloured"),
    [
        ("a king", ["a", "king"], ["a", " king"]),
        ("ROMEO:\nI", ["", "ROMEO", ":", "\n", "I"], ["", "ROMEO", ":", "\n", "I"]),
        ("a\u4f60 b", ["a", "\ufffd", "\ufffd", "\ufffd", "b"], ["a", " b"]),
        ("the end", ["nowhere", "the"], ["the"]),
        ("", [], []),
    ],
)
def test_an_answer_takes_the_colours_of_its_tokens(text, tokens, coloured):
    """Tokens that were decoded alone are found in the text; nothing of it is lost where one is not."""
    pieces = list(terminal.coloured_answer(text, tokens, [-1.0] * len(tokens)))
    assert "".join(piece for piece, _ in pieces) == text
    found = [piece.strip("\u4f60") for piece, logprob in pieces if logprob is not None]
    assert [piece.strip(" ") for piece in found] == [piece.strip(" ") for piece in coloured]
