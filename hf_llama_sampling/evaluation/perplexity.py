"""Score texts: a logprob for each token of each text, and the perplexities computed from them.

The definitions per word and byte, and the context of the first token, are lm-evaluation-harness' own
(EleutherAI/lm-evaluation-harness, ``lm_eval/api/task.py``, ``lm_eval/api/metrics.py``). What this module does not do:
it prints nothing (see `terminal` and `page`).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..generation.scoring import NamedLogprobs
from ..llama.infilling import token_pieces
from ..llama.llama import Llama
from ..llama.named_tokens import LogprobsOf, named_ids
from ..llama.tokenizer import id_before
from .pieces import Piece, pieces_of, text_after

Bos = int | bool | None


@dataclass(frozen=True)
class Perplexity:
    """Counts of a text, or of several, and their perplexities.

    Args:
        tokens: number of tokens, without a BOS put before the text.
        scored: number of tokens with a logprob; one less than `tokens` if the first one has no context.
        words: number of runs of characters between white space, as the harness counts them.
        bytes: length of the text in UTF-8.
        logprob: the sum over the scored tokens, natural logarithm.

    >>> figures = Perplexity(tokens=4, scored=4, words=2, bytes=8, logprob=-4 * math.log(2))
    >>> figures.per_token, figures.per_word, figures.bits_per_byte
    (2.0, 4.0, 0.5)
    """

    tokens: int
    scored: int
    words: int
    bytes: int
    logprob: float

    @property
    def per_token(self) -> float:
        """exp of the mean surprise of a scored token."""
        return self._per(self.scored)

    @property
    def per_word(self) -> float:
        """The harness' ``word_perplexity``."""
        return self._per(self.words)

    @property
    def per_byte(self) -> float:
        """The harness' ``byte_perplexity``."""
        return self._per(self.bytes)

    @property
    def bits_per_byte(self) -> float:
        """The harness' ``bits_per_byte``."""
        return -self.logprob / self.bytes / math.log(2)

    def record(self) -> dict[str, Any]:
        """Return the figures by name; None for those too large for a float."""
        figures = {
            "perplexity": self.per_token,
            "word_perplexity": self.per_word,
            "byte_perplexity": self.per_byte,
            "bits_per_byte": self.bits_per_byte,
        }
        return {
            "num_tokens": self.tokens,
            "num_scored": self.scored,
            "num_words": self.words,
            "num_bytes": self.bytes,
            "logprob": self.logprob,
            **{name: value if math.isfinite(value) else None for name, value in figures.items()},
        }

    def _per(self, count: int) -> float:
        """Compute a perplexity per `count`; infinity if too large for a float (a long text may be one word)."""
        try:
            return math.exp(-self.logprob / count)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class ScoredText:
    """A text and its scores; lists hold one item per token.

    Args:
        name: of its file.
        text: as it was read.
        ids: its tokens, without the BOS put before it.
        logprobs: None for a token without context.
        top_logprobs: the best ids with their logprobs, best first; empty for a token without context.
        before: the id put before the text, so that its first token is scored too; None for none.
        window: size and stride of the window that slid over the text; None for a text that fits.
        llama: the model and tokenizer that scored it.
        logprobs_of: the named ids with logprobs and ranks; empty for a token without context. None if none were named.
    """

    name: str
    text: str
    ids: list[int]
    logprobs: list[float | None]
    top_logprobs: list[list[tuple[int, float]]]
    before: int | None
    window: tuple[int, int] | None
    llama: Llama
    logprobs_of: list[NamedLogprobs] | None = None
    _texts: dict[int, str] = field(default_factory=dict, repr=False)  # of tokens after another token

    @cached_property
    def pieces(self) -> list[Piece]:
        """Split the text into the pieces that its tokens spell."""
        return pieces_of(self.ids, self.llama.text_of)

    @cached_property
    def perplexity(self) -> Perplexity:
        """Compute the text's counts and perplexities."""
        scored = [value for value in self.logprobs if value is not None]
        words, size = len(re.split(r"\s+", self.text)), len(self.text.encode())
        return Perplexity(len(self.ids), len(scored), words, size, math.fsum(scored))

    @property
    def first_token(self) -> str:
        """Describe how the first token is scored."""
        if self.before is None:
            return "not scored, since nothing stands before it"
        return f"scored after {token_pieces([self.before], self.llama.tokenizer)[0]}"

    def piece_logprob(self, piece: Piece) -> float | None:
        """Sum the logprobs of a piece's tokens; None if none is scored."""
        found = [value for value in self.logprobs[piece.first : piece.last] if value is not None]
        return math.fsum(found) if found else None

    def token_text(self, place: int, token: int) -> str:
        """Return the text that a token adds at this position; its vocabulary name if that is not a whole character."""
        if place > 0 and token in self._texts:
            return self._texts[token]
        known = token < self.llama.tokenizer.n_words  # a model may have more ids than its tokenizer
        name = token_pieces([token], self.llama.tokenizer)[0] if known else f"<{token}>"
        text = text_after(self.ids[max(place - 1, 0) : place], token, self.llama.text_of, name)
        if place > 0:
            self._texts[token] = text
        return text

    def most_surprising(self, count: int) -> list[Piece]:
        """List the pieces with the lowest logprobs, lowest first."""
        scored = [piece for piece in self.pieces if self.piece_logprob(piece) is not None]
        return sorted(scored, key=lambda piece: (self.piece_logprob(piece), piece.first))[:count]

    def record(self) -> dict[str, Any]:
        """Return the text's scores as `score --json` prints them; `offsets` are (start, end) in characters."""
        spans = [(piece.start, piece.start + len(piece.text)) for piece in self.pieces for _ in range(*piece[2:])]
        return {
            "file": self.name,
            **self.perplexity.record(),
            "ids": self.ids,
            "tokens": [self.token_text(place, token) for place, token in enumerate(self.ids)],
            "offsets": spans,
            "logprobs": self.logprobs,
            "top_logprobs": [
                [{"id": token, "token": self.token_text(place, token), "logprob": value} for token, value in top]
                for place, top in enumerate(self.top_logprobs)
            ],
            **({} if self.logprobs_of is None else {"logprobs_of": [*map(self._named, range(len(self.ids)))]}),
        }

    def _named(self, place: int) -> list[dict[str, Any]]:
        assert self.logprobs_of is not None
        return [
            {"id": token, "token": self.token_text(place, token), "logprob": value, "rank": rank}
            for token, value, rank in self.logprobs_of[place]
        ]


def total(texts: Sequence[ScoredText]) -> Perplexity:
    """Sum the figures of several texts, so that each token, word and byte counts once."""
    each = [text.perplexity for text in texts]
    return Perplexity(
        sum(one.tokens for one in each),
        sum(one.scored for one in each),
        sum(one.words for one in each),
        sum(one.bytes for one in each),
        math.fsum(one.logprob for one in each),
    )


def first_context(llama: Llama, bos: Bos) -> int | None:
    """Choose the id to put before each text, so that its first token is scored too; None for no id.

    Args:
        bos: an id; `True` for the tokenizer's BOS; `False` for nothing; None for the harness' convention, the
            tokenizer's BOS, or its EOS where it has none.

    Raises:
        ValueError: `True`, and the tokenizer has no BOS.
    """
    own, eos = llama.tokenizer.bos_id, llama.tokenizer.eos_id
    if bos is None:
        return next((token for token in (own, eos) if token >= 0), None)
    return id_before(llama.tokenizer, bos)


def score_texts(
    llama: Llama,
    texts: Sequence[tuple[str, str]],
    *,
    bos: Bos = None,
    top_logprobs: int = 5,
    logprobs_of: LogprobsOf | None = None,
    max_seq_len: int | None = None,
    stride: int | None = None,
) -> list[ScoredText]:
    """Score each text independently.

    Args:
        llama: the model and its tokenizer.
        texts: (name, text) each.
        bos: the id to put before each text, see `first_context`.
        top_logprobs: number of best tokens to keep at each position.
        logprobs_of: ids, or texts of one token, whose logprobs and ranks to keep at each position.
        max_seq_len: most tokens of a window; the model's context if not given.
        stride: step of the window over a longer text; half the window if not given.

    Raises:
        ValueError: a text of which no token can be scored, or a value out of range; the text is named.
    """
    before = first_context(llama, bos)
    rows = [llama.tokenizer.encode(text, bos=False, eos=False) for _, text in texts]
    for (name, _), row in zip(texts, rows, strict=True):
        if not row:
            raise ValueError(f"a text must hold at least one token, but {name} is empty: give a text")
        if len(row) == 1 and before is None:
            raise ValueError(
                f"nothing stands before the only token of {name}, so it has no probability: put a token before it (bos)"
            )
    size = llama.max_seq_len if max_seq_len is None else max_seq_len
    lengths = [len(row) + (before is not None) for row in rows]
    if stride is None and max(lengths) > size:
        stride = max(1, size // 2)
    named = named_ids(logprobs_of, len(rows), llama.tokenizer)
    scored: Any = llama.model.score_tokens(
        rows, bos=before, top_logprobs=top_logprobs, logprobs_of=named, max_seq_len=size, stride=stride
    )
    tops = scored.top_logprobs or [[[] for _ in row] for row in rows]
    places = scored.logprobs_of or [None] * len(rows)
    return [
        ScoredText(
            *(name, text, row, _without_blank(logprobs, before is None), top, before),
            None if stride is None or length <= size else (size, stride),
            llama,
            place,
        )
        for (name, text), row, logprobs, top, place, length in zip(
            texts, rows, scored.logprobs, tops, places, lengths, strict=True
        )
    ]


def _without_blank(logprobs: list[float], unscored: bool) -> list[float | None]:
    """Replace the first token's 0.0 by None if it was not scored."""
    return [None, *logprobs[1:]] if unscored else list(logprobs)
