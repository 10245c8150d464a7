"""Requests through the model by continuous batching: one that is done makes room for the next.

The answers are those of `engine`, up to the rounding of the logits. What fails here is asked again there, alone or in
batches, so errors are the same too. This module reads no records and writes no files, and never looks at logits.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..generation.continuous import requests_in_flight
from ..llama.llama import Llama
from .engine import decoder_of, is_out_of_memory, respond_with_tokens
from .requests import Refused, Request, Response
from .settings import BatchLimits, RunSettings

logger = logging.getLogger(__name__)

_PAGE = 32  # tokens; what a request holds beyond its own is less than a page
_FORWARD = 256  # most tokens of a forward: more would not make it faster per token


def refuse_without_place(settings: RunSettings) -> None:
    """Refuse what continuous batching does not give: numbers about prompts, other tokens and other distributions.

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
        otherwise: answers requests in another way; it gets those that fail here.
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
        self.fits = True  # until memory runs out

    def responses(self, batches: Sequence[Sequence[Request]]) -> Iterator[list[Response]]:
        """All responses, in as many pieces as come, in no order. Requests are added batch by batch."""
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
        """Responses as they come; what got one is taken out of `left`, and what failed stays in it."""
        asked = list(left.values())
        with self.llama.model.continuous_batching_context_manager(
            continuous_batching_config=self._config(asked),
            logprobs=self.settings.logprobs,
            max_seq_len=self.llama.max_seq_len,
            eos_token_id=self.llama.eos_ids,
        ) as manager:
            pending = sum(self._add(manager, request) for request in asked)
            while pending:
                results = _finished(manager)
                pending -= len(results)
                responses = [
                    self._response(left.pop(result.request_id), result) for result in results if result.error is None
                ]
                if responses:
                    yield responses

    def _config(self, requests: Sequence[Request]) -> Any:
        """A cache of as many tokens as the limits allow, and of one request at least."""
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
        """Whether the manager takes the request; named tokens and stop strings are for the other engine."""
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
        except ValueError:  # said by the other engine
            return False
        return True

    def _response(self, request: Request, result: Any) -> Response:
        tokens = list(result.generated_tokens)
        stopped = tokens[-1:] and tokens[-1] in self.llama.eos_ids
        tokens = tokens[:-1] if stopped else tokens
        beside = {"logprobs": result.logprobs[: len(tokens)]} if self.settings.logprobs else {}
        text_of = decoder_of(self.llama, request)
        return respond_with_tokens(request, tokens, text_of, "stop" if stopped else "length", beside)


def _finished(manager: Any) -> list[Any]:
    """At least one finished result, and all that are there already.

    Raises:
        RuntimeError: the manager's thread ended early.
    """
    results: list[Any] = []
    while not results or not manager.output_router.output_queue.empty():
        result = manager.get_result(timeout=1)
        failure = manager.background_thread_status.fatal_error
        if failure is not None or (result is None and not manager.is_running()):
            raise RuntimeError(f"continuous batching failed: {failure or 'its thread ended'}") from failure
        if result is not None:
            results.append(result)
    return results
