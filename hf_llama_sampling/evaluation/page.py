"""Render scored texts as one self-contained HTML page: a heat map of the text, with the best tokens at each position.

Every text is escaped, and the page's policy allows only the script and the style in this folder, and no requests. What
this module does not do: it computes no number, and writes no file (see `files`).
"""

import base64
import hashlib
import itertools
import json
import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..defaults import __version__
from .levels import NAMES, as_percent, level_of
from .perplexity import Perplexity, ScoredText, total
from .pieces import Piece

_MARK = "<!DOCTYPE html>\n<!-- written by hf-llama-sampling score -->\n"
_LISTED = 6  # most surprising pieces
_CONTEXT = 24  # characters before them
_BARS = 160  # of the curve
_KEPT = {"\n", "\t", "\u200c", "\u200d"}  # joiners are parts of scripts and emoji
_CLOSED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def is_page(file: Path) -> bool:
    """Whether a file is a page that this module made."""
    with file.open("rb") as opened:
        return opened.read(len(_MARK)) == _MARK.encode()


def page(texts: Sequence[ScoredText], model: str) -> str:
    """Render the whole page.

    Args:
        texts: at least one.
        model: the model's name, to show.
    """
    style, script = (_read(name) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    title = _name(texts[0].name) if len(texts) == 1 else f"{len(texts)} texts"
    said = [f"model {model}", f"first token {texts[0].first_token}"]
    window = next((text.window for text in texts if text.window), None)
    said += [f"windows of {window[0]:,} tokens, {window[1]:,} apart"] if window else []
    header = f'<h1>Token probabilities of {_safe(title)}</h1>\n<p class="quiet">{_safe(" · ".join(said))}</p>'
    sections = "".join(_section(text, number, alone=len(texts) == 1) for number, text in enumerate(texts))
    return (
        f'{_MARK}<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f'<meta name="generator" content="hf-llama-sampling {__version__}">\n'
        f"<title>Token probabilities: {_safe(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<div class="frame">\n<header>\n{header}\n</header>\n<div class="columns">\n'
        f"<main>\n{_summary(texts)}{sections}</main>\n{_DETAILS}</div>\n</div>\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


_DETAILS = (
    '<aside aria-labelledby="details-title">\n<h2 id="details-title">Token</h2>\n'
    '<div id="details" role="status" aria-live="polite">\n'
    '<p class="quiet">Point at a token, or choose one with <kbd>Tab</kbd> and the arrow keys: its probability, its '
    "place and the most probable tokens there stand here.</p>\n</div>\n"
    '<noscript><p class="quiet">Details of a token need JavaScript.</p></noscript>\n</aside>\n'
)


def _summary(texts: Sequence[ScoredText]) -> str:
    """Render the figures of all texts, the levels with their shares, and a table of the texts if there are several."""
    figures = total(texts)
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _figures(figures))
    table = ""
    if len(texts) > 1:
        rows = "".join(_row(text, number) for number, text in enumerate(texts))
        names = ("tokens", "words", "bytes", "per token", "per word", "per byte")
        heads = "".join(f'<th scope="col" class="number">{name}</th>' for name in names)
        table = (
            f'<h2>Texts</h2>\n<div class="scroll"><table><thead><tr><th scope="col">text</th>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>\n"
        )
    return f'<dl class="figures">{shown}</dl>\n{_legend(texts)}{table}'


def _figures(figures: Perplexity) -> list[tuple[str, str]]:
    """List names and values of the summary."""
    tokens = f"{figures.tokens:,}"
    if figures.scored != figures.tokens:
        tokens += f' <span class="quiet">({figures.scored:,} scored)</span>'
    return [
        ("perplexity per token", _number(figures.per_token)),
        ("perplexity per word", _number(figures.per_word)),
        ("perplexity per byte", _number(figures.per_byte)),
        ("bits per byte", _number(figures.bits_per_byte)),
        ("tokens", tokens),
        ("words", f"{figures.words:,}"),
        ("bytes", f"{figures.bytes:,}"),
        ("sum of logprobs", f"{figures.logprob:,.2f}"),
    ]


def _row(text: ScoredText, number: int) -> str:
    one = text.perplexity
    values = [f"{count:,}" for count in (one.tokens, one.words, one.bytes)]
    values += [_number(value) for value in (one.per_token, one.per_word, one.per_byte)]
    cells = "".join(f'<td class="number">{value}</td>' for value in values)
    return f'<tr><td><a href="#section{number}">{_safe(_name(text.name))}</a></td>{cells}</tr>'


def _legend(texts: Sequence[ScoredText]) -> str:
    """Render the colours, each with its share of the tokens."""
    known = [level_of(value) for text in texts for value in text.logprobs if value is not None]
    shares = [known.count(level) / len(known) for level in range(len(NAMES))]
    bars, at = "", 0.0
    for level, share in enumerate(shares):
        bars += f'<rect class="f{level}" x="{100 * at:.3f}" y="0" width="{100 * share:.3f}" height="1"/>'
        at += share
    items = "".join(
        f'<li><span class="swatch f{level}"></span>{name}: {100 * share:.0f}% of tokens</li>'
        for level, (name, share) in enumerate(zip(NAMES, shares, strict=True))
    )
    return (
        '<h2>Colours: the probability of a token</h2>\n<svg class="share" viewBox="0 0 100 1" '
        f'preserveAspectRatio="none" aria-hidden="true">{bars}</svg>\n<ul class="legend">{items}</ul>\n'
    )


def _section(text: ScoredText, number: int, *, alone: bool) -> str:
    """Render one text: its most surprising pieces, its curve, and the heat map with its data."""
    heading = "Text" if alone else _safe(_name(text.name))
    decoded = "".join(piece.text for piece in text.pieces)
    note = "" if decoded == text.text else '<p class="quiet">Shown as the tokenizer decodes it: not as in the file.</p>'
    surprising = _surprising(text, number)
    return (
        f'<section id="section{number}" aria-labelledby="heading{number}">\n<h2 id="heading{number}">{heading}</h2>\n'
        f"{surprising}{_curve(text)}{note}\n<h3>Token by token</h3>\n"
        f'<p class="quiet" id="keys{number}"><kbd>Tab</kbd> to the text, then <kbd>&larr;</kbd> <kbd>&rarr;</kbd> '
        "<kbd>&uarr;</kbd> <kbd>&darr;</kbd> <kbd>Home</kbd> <kbd>End</kbd>.</p>\n"
        f'<div class="text" id="text{number}" role="group" aria-label="Text, token by token" '
        f'aria-describedby="keys{number}" dir="auto" translate="no" data-scores="scores{number}">'
        f"{''.join(_cells(text))}</div>\n"
        f'<script type="application/json" id="scores{number}">{_data(text)}</script>\n</section>\n'
    )


def _cells(text: ScoredText) -> Iterator[str]:
    """Render the pieces of a text, coloured; the Tab key goes to the first one."""
    for number, piece in enumerate(text.pieces):
        logprob = text.piece_logprob(piece)
        colour = "u" if logprob is None else f"s{level_of(logprob)}"
        index = -1 if number else 0
        attributes = f'class="t {colour}" role="button" tabindex="{index}" aria-controls="details"'
        yield f"<span {attributes}>{_shown(piece.text)}</span>"


def _surprising(text: ScoredText, number: int) -> str:
    """Render the pieces with the lowest probabilities: a table with buttons that jump to them."""
    places = {piece.first: place for place, piece in enumerate(text.pieces)}
    decoded = "".join(piece.text for piece in text.pieces)
    rows = ""
    for piece in text.most_surprising(_LISTED):
        logprob = text.piece_logprob(piece)
        assert logprob is not None
        before = decoded[max(piece.start - _CONTEXT, 0) : piece.start].replace("\n", " ")
        shown = _spelled(piece.text.replace("\n", "\u21b5")) or "(no character)"
        rows += (
            f'<tr><td class="token"><span class="context">{escape(_plain(before))}</span>'
            f'<button type="button" data-text="text{number}" data-cell="{places[piece.first]}">{shown}</button></td>'
            f'<td class="number">{as_percent(logprob)}</td><td class="token wide">{_best(text, piece)}</td>'
            f'<td class="number">{piece.start:,}</td></tr>'
        )
    return (
        '<h3>Most surprising</h3>\n<div class="scroll"><table><thead><tr><th scope="col">token, after its text</th>'
        '<th scope="col" class="number">probability</th><th scope="col" class="wide">most probable</th>'
        f'<th scope="col" class="number">offset</th></tr></thead><tbody>{rows}</tbody></table></div>\n'
    )


def _best(text: ScoredText, piece: Piece) -> str:
    """Render the most probable token at a piece's position."""
    best = text.top_logprobs[piece.first]
    if not best:
        return ""
    token, logprob = best[0]
    name = text.token_text(piece.first, token).replace("\n", "\u21b5").replace(" ", "\u2423")
    return f"{_spelled(name)} {as_percent(logprob)}"


def _curve(text: ScoredText) -> str:
    """Plot the mean surprise along the text, in bits per token."""
    known = [-value / math.log(2) for value in text.logprobs if value is not None]
    if len(known) < 32:
        return ""
    count = min(_BARS, len(known) // 2)
    cuts = [len(known) * place // count for place in range(count + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    most = max(*means, 1e-9)
    bars = "".join(
        f'<rect x="{place + 0.1:.1f}" y="{1 - mean / most:.4f}" width="0.8" height="{mean / most:.4f}"/>'
        for place, mean in enumerate(means)
    )
    return (
        f'<h3>Surprise along the text</h3>\n<p class="quiet">Mean bits per token; the highest bar is {most:.1f}.</p>\n'
        f'<svg class="curve" viewBox="0 0 {count} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="Mean surprise in {count} parts of the text, from {min(means):.1f} to {most:.1f} bits per token">'
        f"{bars}</svg>\n"
    )


def _data(text: ScoredText) -> str:
    """Encode the data of each token for the page's script, as JSON that cannot close its element."""
    names: dict[int, str] = {}
    for place in reversed(range(len(text.ids))):  # last to first: the first token's names lack the leading space
        for token in (text.ids[place], *(other for other, _ in text.top_logprobs[place])):
            if token not in names:
                names[token] = _plain(text.token_text(place, token))
    data: dict[str, Any] = {
        "pieces": [(piece.start, piece.first, piece.last) for piece in text.pieces],
        "sizes": [len(piece.text) for piece in text.pieces],
        "ids": text.ids,
        "logprobs": [None if value is None else round(value, 5) for value in text.logprobs],
        "top": [[(token, round(value, 5)) for token, value in top] for top in text.top_logprobs],
        "names": names,
    }
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return "".join(_CLOSED.get(character, character) for character in written)


def _shown(text: str) -> str:
    """Render a piece as HTML, with a mark at line ends and invisible characters spelled out."""
    return _spelled(text).replace("\n", '<span class="n" aria-hidden="true"></span>\n')


def _spelled(text: str) -> str:
    """Render a text as HTML, with invisible and text-direction characters spelled out and framed."""
    return "".join(
        f'<i class="c">{escape(_escaped(character))}</i>' if _is_hidden(character) else escape(character)
        for character in text
    )


def _plain(text: str) -> str:
    """Render a text with these characters spelled out, as plain text."""
    return "".join(_escaped(character) if _is_hidden(character) else character for character in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _is_hidden(character: str) -> bool:
    return character not in _KEPT and unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs")


def _safe(text: str) -> str:
    return escape(_plain(text))


def _name(name: str) -> str:
    """Convert a file's name to text; its bytes may not be valid in any encoding."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _number(value: float) -> str:
    """Format a number with four digits, a large one with a power of ten."""
    if value == math.inf:
        return "over 10<sup>308</sup>"
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """Compute the hash by which the policy names a script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
