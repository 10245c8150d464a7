"""Print scored texts and completions on a terminal, coloured by probability; as plain text in a pipe.

Colours need rich, of the extra ``report``; without it a terminal gets plain text and one sentence that says so. What
this module does not do: it computes no number.
"""

import functools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..console import on_terminal, say, visible, write, write_named
from .levels import LEAST, NAMES, as_percent, level_of
from .perplexity import Perplexity, ScoredText, total

# From cool to hot, readable on light and dark terminals; a terminal with few colours shows its nearest.
_STYLES = (
    "",
    "black on #9fc5e8",
    "black on #d5dde5",
    "black on #fbdc8e",
    "black on #f2955c",
    "bold #ffffff on #b3261e",
)
_LISTED = 5  # most surprising pieces
_GAP = 2  # most characters of the text per token that is not a whole character

Coloured = Iterable[tuple[str, float | None]]  # a piece of text, and its logprob if it has one


def write_coloured(pieces: Coloured) -> None:
    """Print a text and a line end; on a terminal each piece has the colour of its probability."""
    listed = list(pieces)
    console = _console()
    if console is None:
        write("".join(text for text, _ in listed))
        return
    from rich.text import Text

    line = Text()
    for text, logprob in listed:
        line.append(visible(text), None if logprob is None else _STYLES[level_of(logprob)])
    console.print(line, soft_wrap=True)


def write_legend() -> None:
    """Print the probability of each colour; nothing without colours."""
    if _console() is not None:
        write("probability ", end="")
        write_coloured((f" {name} ", math.log(max(least, 1e-9))) for name, least in zip(NAMES, LEAST, strict=True))


def write_scores(texts: Sequence[ScoredText]) -> None:
    """Print each text, its most surprising tokens and its figures; then those of all, if there are several."""
    for number, text in enumerate(texts):
        if len(texts) > 1:
            write(f"{'' if number == 0 else chr(10)}--- {text.name}")
        write_coloured((piece.text, text.piece_logprob(piece)) for piece in text.pieces)
        write("")
        write_figures(text.perplexity)
        write(f"{'first token':<20}  {text.first_token}")
        write_surprising(text)
        if text.logprobs_of is not None:
            tokens = [text.token_text(place, token) for place, token in enumerate(text.ids)]
            named = next((found for found in text.logprobs_of if found), [])
            write_named(tokens, [text.token_text(1, token) for token, _, _ in named], text.logprobs_of)
    if len(texts) > 1:
        write(f"\n--- all {len(texts)} texts")
        write_figures(total(texts))
    write_legend()


def write_figures(figures: Perplexity) -> None:
    """Print counts and perplexities, a line each."""
    note = "" if figures.scored == figures.tokens else f" ({figures.scored} scored)"
    write(f"tokens {figures.tokens}{note}, words {figures.words}, bytes {figures.bytes}")
    for name, value in (
        ("perplexity per token", figures.per_token),
        ("perplexity per word", figures.per_word),
        ("perplexity per byte", figures.per_byte),
        ("bits per byte", figures.bits_per_byte),
    ):
        write(f"{name:<20}  {value:.4f}" if value < 1e9 else f"{name:<20}  {value:.4e}")


def write_surprising(text: ScoredText) -> None:
    """Print the pieces with the lowest probabilities, and the most probable token at each one's position."""
    write("most surprising")
    for piece in text.most_surprising(_LISTED):
        logprob = text.piece_logprob(piece)
        assert logprob is not None
        best = text.top_logprobs[piece.first]
        instead = (
            f", most probable {text.token_text(piece.first, best[0][0])!r} {as_percent(best[0][1])}" if best else ""
        )
        write(f"  {piece.text!r} at {piece.start}: {as_percent(logprob)}{instead}")


def coloured_answer(text: str, tokens: Sequence[str], logprobs: Sequence[float]) -> Iterator[tuple[str, float | None]]:
    """Split a completion into pieces with logprobs, for tokens that were decoded one by one.

    Find the tokens in the text, one after another. Spaces that a token lost when decoded alone belong to it; characters
    that several tokens spell together get no logprob.

    >>> list(coloured_answer("a king", ["a", "king"], [-1.0, -2.0]))
    [('a', -1.0), (' king', -2.0), ('', None)]
    """
    at = unseen = 0  # characters yielded, tokens since then that were not found in the text
    for token, logprob in zip(tokens, logprobs, strict=True):
        begin = text.find(token, at) if token else at
        gap = text[at:begin]
        if begin < 0 or (gap.strip() and len(gap) > _GAP * unseen):
            unseen += 1
            continue
        if gap.strip():
            yield gap, None
            at = begin
        yield text[at : begin + len(token)], logprob
        at, unseen = begin + len(token), 0
    yield text[at:], None


def _console() -> Any:
    """Make rich's console on standard output; None in a pipe or without rich."""
    if not on_terminal(sys.stdout):
        return None
    try:
        from rich.console import Console
    except ImportError:
        _say_what_is_missing()
        return None
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


@functools.cache
def _say_what_is_missing() -> None:
    """Say once per process that rich is missing."""
    say("colours need rich: pip install rich")
