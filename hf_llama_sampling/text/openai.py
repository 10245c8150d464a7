"""Answers in the completions format of OpenAI's API, as its clients and lm-evaluation-harness read it.

What this module does not do: it serves nothing, and looks at no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .tokens import TokenSpeller, TokenTexts

_LEAST = -9999.0  # OpenAI's logprob of what cannot be, such as a token that a processor forbids: JSON has no infinity


@dataclass(frozen=True)
class Choice:
    """One row of an answer; lists have one entry per token of the answer.

    Args:
        texts: the tokens' texts.
        ids: the tokens' ids.
        logprobs: their raw logprobs; None if none were asked for.
        top_logprobs: the best ids at each token's position; None if none were asked for.
        unscored: number of leading tokens without a logprob.
        prompt: number of prompt tokens, whether the answer holds them or not.
        completion: number of completion tokens.
        finish_reason: `"stop"` or `"length"`.
    """

    texts: TokenTexts
    ids: Sequence[int]
    logprobs: Sequence[float] | None
    top_logprobs: Sequence[Sequence[tuple[int, float]]] | None
    unscored: int
    prompt: int
    completion: int
    finish_reason: str
    stop_reason: str | None = None  # the stop string that ended the completion

    def to_dict(self, index: int, speller: TokenSpeller) -> dict[str, Any]:
        """Convert to OpenAI's format."""
        return {
            "index": index,
            "text": self.texts.text,
            "logprobs": None if self.logprobs is None else self._logprobs(self.logprobs, speller),
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }

    def cut_at(self, count: int, dropped: int, reason: str | None) -> "Choice":
        """Keep the first `count` tokens, and cut `dropped` characters off the text, if a stop string was met."""
        if reason is None:
            return self
        return replace(
            self,
            texts=self.texts.cut(count, len(self.texts.text) - dropped),
            ids=self.ids[:count],
            logprobs=None if self.logprobs is None else self.logprobs[:count],
            top_logprobs=None if self.top_logprobs is None else self.top_logprobs[:count],
            completion=self.completion - (len(self.ids) - count),
            finish_reason="stop",
            stop_reason=reason,
        )

    def _logprobs(self, logprobs: Sequence[float], speller: TokenSpeller) -> dict[str, Any]:
        blank = [None] * self.unscored
        tops = None if self.top_logprobs is None else [*blank, *self._tops(logprobs, speller)]
        return {
            "tokens": self.texts.pieces,
            "token_logprobs": [*blank, *(max(value, _LEAST) for value in logprobs[self.unscored :])],
            "top_logprobs": tops,
            "text_offset": self.texts.offsets,
            "bytes": [list(spelled) for spelled in self.texts.bytes],
        }

    def _tops(self, logprobs: Sequence[float], speller: TokenSpeller) -> list[dict[str, float]]:
        """Map names to logprobs: the best tokens and the actual one; of equal names all but the first are ids."""
        assert self.top_logprobs is not None
        found = []
        for token, logprob, best in list(zip(self.ids, logprobs, self.top_logprobs, strict=True))[self.unscored :]:
            names: dict[str, float] = {}
            for other, value in (dict(best) | {token: logprob}).items():
                name = speller.name_of(other)
                names[f"token_id:{other}" if name in names else name] = max(value, _LEAST)
            found.append(names)
        return found


def completions(choices: Sequence[Choice], speller: TokenSpeller, model: str) -> dict[str, Any]:
    """Build a whole answer in OpenAI's completions format."""
    prompt, completion = sum(choice.prompt for choice in choices), sum(choice.completion for choice in choices)
    return {
        "object": "text_completion",
        "model": model,
        "choices": [choice.to_dict(index, speller) for index, choice in enumerate(choices)],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }
