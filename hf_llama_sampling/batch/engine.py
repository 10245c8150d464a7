"""Answer requests a batch at a time; if memory runs out, in halves.

This module reads no records and writes no files, and never looks at logits.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..defaults import SAMPLING_LOGPROBS
from ..llama.llama import Llama
from ..text.stopping import Cut, StopStrings, TextOf
from .ordering import cost
from .requests import Request, Response, respond, respond_with_error
from .settings import RunSettings

logger = logging.getLogger(__name__)

_DOES_NOT_FIT = "the memory does not hold this record alone: shorten it, lower max_gen_len, or use more memory"


class Engine:
    """Answers batches of requests with one model, by the settings of one run."""

    def __init__(self, llama: Llama, settings: RunSettings) -> None:
        self.llama = llama
        self.settings = settings

    def run(self, batch: Sequence[Request]) -> list[Response]:
        """Call the model once; return one response per request, in order.

        Raises:
            ValueError: a row is wrong; it may be any of them.
        """
        return self._score(batch) if self.settings.score else self._generate(batch)

    def _score(self, batch: Sequence[Request]) -> list[Response]:
        alike: dict[tuple[Any, ...], list[int]] = {}  # rows that one call can score
        for row, request in enumerate(batch):
            alike.setdefault((request.stride, request.bos, request.start > 0), []).append(row)
        responses: dict[int, Response] = {}
        for rows in alike.values():
            responses |= zip(rows, self._score_alike([batch[row] for row in rows]), strict=True)
        return [responses[row] for row in range(len(batch))]

    def _score_alike(self, batch: Sequence[Request]) -> Iterator[Response]:
        """Score requests with BOS and stride in common, that begin all at their first token or all at a later one."""
        top, first = self.settings.top_logprobs, batch[0]
        scored = self.llama.model.score_tokens(
            [request.prompt for request in batch],
            top_logprobs=top,
            logprobs_of=_named(batch),
            start=[request.start for request in batch] if first.start else None,
            max_seq_len=self.llama.max_seq_len,
            stride=first.stride,
            bos=first.bos,
        )
        for row, request in enumerate(batch):
            fields = {
                "prompt_tokens": request.prompt,
                "prompt_logprobs": scored.logprobs[row],
                "total": scored.totals[row],
                "count": scored.counts[row],
            }
            if top:
                fields["top_logprobs"] = scored.top_logprobs[row]
            if request.named:
                fields["logprobs_of"] = scored.logprobs_of[row]
            yield respond(request, fields, len(request.prompt))

    def _generate(self, batch: Sequence[Request]) -> list[Response]:
        settings = self.settings
        decoders = [decoder_of(self.llama, request) for request in batch]
        listed = [request.stop for request in batch]
        stops = StopStrings(listed, len(batch), self.llama.speller.control_tokens if any(listed) else None)
        prompts = [request.prompt for request in batch]
        made = self.llama.model.generate(
            prompts,
            max_gen_len=[request.limit for request in batch],
            temperature=[request.temperature for request in batch],
            top_p=[request.top_p for request in batch],
            seeds=[request.seed for request in batch],
            max_seq_len=self.llama.max_seq_len,
            eos_token_id=self.llama.eos_ids,
            echo=settings.prompt_logprobs,
            logprobs=settings.logprobs or settings.prompt_logprobs,
            top_logprobs=settings.top_logprobs,
            logprobs_of=_named(batch),
            sampling_logprobs=settings.sampling_logprobs,
            **({"stopping_criteria": [stops.criterion(prompts, decoders)]} if stops else {}),
        )
        wanted = ["logprobs"] * (settings.logprobs or settings.sampling_logprobs)
        wanted += ["top_logprobs"] * (settings.top_logprobs > 0)
        wanted += [*SAMPLING_LOGPROBS] * settings.sampling_logprobs
        responses = []
        for row, request in enumerate(batch):
            start = len(request.prompt) if settings.prompt_logprobs else 0
            named = ["logprobs_of"] * bool(request.named)
            beside = {name: getattr(made, name)[row][start:] for name in [*wanted, *named]}
            more = {}
            if settings.prompt_logprobs:
                more = {"prompt_tokens": request.prompt, "prompt_logprobs": made.logprobs[row][:start]}
            tokens, reason = made.tokens[row][start:], made.finish_reason[row]
            responses.append(
                respond_with_tokens(
                    request, tokens, decoders[row], reason, beside, more, stops.cut(row, tokens, decoders[row])
                )
            )
        return responses


def decoder_of(llama: Llama, request: Request) -> TextOf:
    """Return the decoder of a request's completion: as text after its prompt, or as a message if it is a dialog."""
    return llama.text_of if request.is_dialog else llama.speller.text_after(request.prompt)


def respond_with_tokens(
    request: Request,
    tokens: list[int],
    text_of: TextOf,
    finish_reason: str,
    beside: dict[str, list[Any]],
    more: dict[str, Any] | None = None,
    cut: Cut | None = None,
) -> Response:
    """Build the response from a request's completion, cut at its stop string.

    Args:
        request: the request.
        tokens: the completion.
        text_of: decodes it.
        finish_reason: why it ended, if not at a stop string.
        beside: fields with one item per token.
        more: other fields, which come last.
        cut: where its stop string cuts it; None for nowhere.
    """
    text, cut = text_of(tokens), cut or Cut(len(tokens), 0, None)
    fields = {
        "generation": text[: len(text) - cut.dropped],
        "tokens": tokens[: cut.tokens],
        "finish_reason": finish_reason if cut.reason is None else "stop",
        **({"stop_reason": cut.reason} if request.stop else {}),
        "seed": request.seed,
        **{name: values[: cut.tokens] for name, values in beside.items()},
        **(more or {}),
    }
    return respond(request, fields, cut.tokens)


def _named(batch: Sequence[Request]) -> list[list[int]] | None:
    """Return the ids to score in each row, or None if no row asks for any."""
    return [list(request.named) for request in batch] if any(request.named for request in batch) else None


class OutOfMemoryBackoff:
    """Runs a batch; if that fails for lack of memory or because of a wrong row, runs its halves.

    A size that did not fit is not tried again.

    Args:
        run: answers a batch.
    """

    def __init__(self, run: Callable[[Sequence[Request]], list[Response]]) -> None:
        self.run = run
        self.most = math.inf  # cost of a batch

    def responses(self, batch: Sequence[Request]) -> Iterator[list[Response]]:
        """Yield all responses, in as many pieces as needed. A single request that fails gets an error response."""
        if len(batch) == 1 or cost(batch) <= self.most:
            result = self._try(batch)
            if not isinstance(result, str):
                yield result
                return
            if result == _DOES_NOT_FIT:  # the failed call's tensors have been freed with its traceback
                clear_device_cache(garbage_collection=True)
            if len(batch) == 1:
                yield [respond_with_error(batch[0].index, batch[0].id, result)]
                return
        half = (len(batch) + 1) // 2
        yield from self.responses(batch[:half])
        yield from self.responses(batch[half:])

    def _try(self, batch: Sequence[Request]) -> list[Response] | str:
        """Return the responses, or the reason why there are none."""
        try:
            return self.run(batch)
        except IndexError as error:  # of a position embedding, as in GPT-2
            if "out of range" not in str(error):
                raise
            return "the model has no position for the last tokens of this record: shorten it, or lower max_gen_len"
        except (RuntimeError, MemoryError, ValueError) as error:
            if is_out_of_memory(error):
                if len(batch) > 1:
                    self.most = min(self.most, cost(batch) // 2)
                    logger.warning("out of memory with a batch of %d records: halved", len(batch))
                return _DOES_NOT_FIT
            if not isinstance(error, ValueError):
                raise
            return str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may avoid the error."""
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)
