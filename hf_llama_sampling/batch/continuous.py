"""Answer requests by continuous batching: one that is done makes room for the next.

The answers equal `engine`'s, up to the rounding of the logits. Requests that fail here are run again there, so errors
are the same too. This module reads no records and writes no files, and never looks at logits.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..generation.continuous import requests_in_flight, wait_for_results
from ..llama.llama import Llama
from .engine import decoder_of, is_out_of_memory, respond_with_tokens
from .requests import Refused, Request, Response
from .settings import BatchLimits, RunSettings

logger = logging.getLogger(__name__)

_PAGE = 32  # tokens; a request wastes less than a page
_FORWARD = 256  # most tokens of a forward: more are no faster per token


def refuse_without_place(settings: RunSettings) -> None:
    """Refuse settings that continuous batching lacks: scores of prompts, of other tokens, of other distributions.

    Raises:
        Refused: the settings ask for it.
    """
    for name in ("score", "prompt_logprobs", "top_logprobs", "logprobs_of", "sampling_logprobs"):
        value = getattr(settings, name)
        if value:
            raise Refused(
                f'engine="continuous" gives the logprobs of new tokens alone, and {name}={value} asks for more: drop '
                'it, or use engine="batches"'
            )


class ContinuousEngine:
    """Answers any number of requests by continuous batching, by the settings of one run.

    Args:
        llama: the model and its tokenizer.
        settings: the run's.
        limits: `rows` bounds the requests in flight, `tokens` the cache (one request alone may need more).
        otherwise: the fallback, which answers the requests that fail here.
    """

    def __init__(
        self,
        llama: Llama,
        settings: RunSettings,
        limits: BatchLimits,
        otherwise: Callable[[Sequence[Request]], Iterator[list[Response]]],
    ) -> None:
        refuse_without_place(settings)
        self.llama, self.settings, self.limits, self.otherwise = llama, settings, limits, otherwise
        self.fits = True  # False once memory has run out

    def responses(self, batches: Sequence[Sequence[Request]]) -> Iterator[list[Response]]:
        """Yield all responses, in pieces and in no order. Requests are added batch by batch."""
        left = {str(request.index): request for batch in batches for request in batch}
        try:
            if self.fits and left:
                yield from self._run(left)
        except RuntimeError as error:
            if not is_out_of_memory(error) and not is_out_of_memory(error.__cause__ or error):
                raise
            self.fits = False
            logger.warning("out of memory with continuous batching: the rest is answered in batches")
        for batch in batches:
            again = [request for request in batch if str(request.index) in left]
            if again:
                yield from self.otherwise(again)

    def _run(self, left: dict[str, Request]) -> Iterator[list[Response]]:
        """Yield responses as they come; remove answered requests from `left`, and leave failed ones in it."""
        asked = list(left.values())
        with self.llama.model.continuous_batching_context_manager(
            continuous_batching_config=self._config(asked),
            logprobs=self.settings.logprobs,
            max_seq_len=self.llama.max_seq_len,
            eos_token_id=self.llama.eos_ids,
        ) as manager:
            pending = sum(self._add(manager, request) for request in asked)
            while pending:
                results = wait_for_results(manager)
                pending -= len(results)
                responses = [
                    self._response(left.pop(result.request_id), result) for result in results if result.error is None
                ]
                if responses:
                    yield responses

    def _config(self, requests: Sequence[Request]) -> Any:
        """Size the cache: as many tokens as the limits allow, but at least one request."""
        from transformers import ContinuousBatchingConfig

        reach = [len(request.prompt) + request.limit for request in requests]
        rows = self.limits.rows
        if self.llama.model.device.type == "cpu":
            rows = min(rows, requests_in_flight(reach))
        in_flight = sum(math.ceil(tokens / _PAGE) + 1 for tokens in sorted(reach)[-rows:])
        blocks = max(min(in_flight, self.limits.tokens // _PAGE), math.ceil(max(reach) / _PAGE) + 1)
        return ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=blocks,
            max_batch_tokens=max(_FORWARD, rows),
            max_requests_per_batch=rows,
        )

    def _add(self, manager: Any, request: Request) -> bool:
        """Add the request; return whether it was accepted. Named tokens and stop strings need the fallback."""
        if request.named or request.stop:
            return False
        try:
            manager.add_request(
                request.prompt,
                str(request.index),
                max_new_tokens=request.limit,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
            )
        except ValueError:  # the fallback reports it
            return False
        return True

    def _response(self, request: Request, result: Any) -> Response:
        tokens = list(result.generated_tokens)
        stopped = tokens[-1:] and tokens[-1] in self.llama.eos_ids
        tokens = tokens[:-1] if stopped else tokens
        beside = {"logprobs": result.logprobs[: len(tokens)]} if self.settings.logprobs else {}
        text_of = decoder_of(self.llama, request)
        return respond_with_tokens(request, tokens, text_of, "stop" if stopped else "length", beside)
