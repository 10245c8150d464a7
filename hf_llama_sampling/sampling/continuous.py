"""The rule under continuous batching: each request in a step has settings and a stream of its own.

transformers' loop of continuous batching gives its list of logits processors some int32 values for each request in
flight: prepared on the host, read on the device. `RequestSampler` stands in the place of that list. Its values are the
bits of temperature and `top_p`, and the two words under which the token ids of this position become noise (`streams`).

What this module does not do: it schedules nothing, and it does not know where a text ends.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import fast_path, rule
from .philox import WORD
from .rule import Draw
from .sampler import one_hot
from .streams import keys_at, noise_under, seed_words

_CHILD = "__child#"  # how transformers names the copies that `num_return_sequences` makes of a request
_BLOCK = 64  # positions whose words are derived at once


@dataclass(frozen=True)
class RequestSettings:
    """How one request's tokens are drawn; `request_id` tells the request from the children that are made of it."""

    temperature: float
    top_p: float
    seed: int
    request_id: str

    def copy_of(self, request_id: str) -> int:
        """Which copy of the request this is: 0 for itself, and i + 1 for its child i."""
        return 0 if request_id == self.request_id else int(request_id.rpartition(_CHILD)[2]) + 1


def child_id(request_id: str, number: int) -> str:
    """The id that transformers gives to a request's child."""
    return f"{request_id}{_CHILD}{number}"


def names_a_child(request_id: str) -> bool:
    """Whether an id is one that transformers gives to children of requests."""
    return _CHILD in request_id


class RequestSampler:
    """Draw each request's token, and answer with one-hot rows.

    It has the attributes of transformers' ``ContinuousBatchingLogitsProcessorList`` (5.23), and is put at the
    ``logit_processor`` of a ``ContinuousBatchingManager`` before that starts. A request's settings come with it, as a
    `RequestSettings` under the name `KEY` among its keywords for logits processors.

    Args:
        logprobs: whether `store` hands on the raw logprobs of the tokens.
    """

    KEY = "settings"
    tensors_required = 4  # temperature, top_p, key, salt
    do_processing = True

    def __init__(self, *, logprobs: bool) -> None:
        self.logprobs = logprobs
        self.values = torch.empty(0)  # (R,) float32 of the last step: logprobs or zeros; nan for logits with nan or inf

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Accept a request's keywords, which were checked where it was added."""

    def fill_defaults(self, storage: Tensor) -> None:
        """Fill (4, 1) int32 values of rows without a request: greedy."""
        storage.zero_()

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: Tensor) -> Tensor:
        """Write the values of the requests that get a token in the coming step into (4, most requests) int32."""
        rows = [_values_of(request.state) for request in requests_in_batch if request.has_new_token]
        if rows:
            settings, words = (np.array(part) for part in zip(*rows, strict=True))  # (R, 2) each
            bits = np.concatenate(
                [settings.astype(np.float32).view(np.int32), words.astype(np.uint32).view(np.int32)], 1
            )
            arg_storage[:, : len(rows)].copy_(torch.from_numpy(np.ascontiguousarray(bits.T)))
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, values: Tensor) -> Tensor:
        """input_ids: (R,), unused; scores: (R, V) float32; values: (4, R) int32. Returns scores (R, V), one-hot."""
        draw = draw_requests(scores, values[:, : len(scores)])
        self.values = draw.softmax_probs * 0.0
        if self.logprobs:
            self.values = self.values + scores.gather(1, draw.tokens[:, None])[:, 0] - scores.logsumexp(-1)
        return one_hot(draw.tokens, scores)

    def store(self, sample: Callable[[Tensor, Tensor], None], scores: Tensor, output_ids: Tensor) -> None:
        """Let transformers store the tokens of one-hot scores (1, R, V), and put `values` in place of its logprobs.

        Args:
            sample: transformers' own function of (scores, output_ids).
            scores: (1, R, V).
            output_ids: (2, R or more) int32: tokens, and the bits of logprobs.
        """
        sample(scores, output_ids)
        output_ids[1, : len(self.values)].copy_(self.values.view(torch.int32))


def draw_requests(scores: Tensor, values: Tensor) -> Draw:
    """Draw one token per request. scores: (R, V) float32; values: (4, R) int32, see `RequestSampler`."""
    temperature, top_p = values[:2].view(torch.float32)[:, :, None]  # (R, 1) each
    keys = values[2:].long().T & WORD  # (R, 2)
    greedy = temperature == 0
    best = scores.argmax(-1)
    if fast_path.on_cpu(scores) and bool(greedy.all()):
        return Draw(best, scores.gather(1, best[:, None])[:, 0] * 0.0 + 1.0)
    path = fast_path if fast_path.on_cpu(scores) else rule
    probs = path.softmax_with_temperature(scores, torch.where(greedy, 1.0, temperature))
    draw: Draw = path.draw_by_token(probs, top_p, noise_under(keys), with_mass=False)
    return Draw(torch.where(greedy[:, 0], best, draw.tokens), draw.softmax_probs)


def _values_of(state: Any) -> tuple[tuple[float, float], tuple[int, int]]:
    """The settings and words of a request whose next token stands at `state.position_offset`."""
    settings: RequestSettings | None = state.logit_processor_kwargs.get(RequestSampler.KEY)
    if settings is None:  # one of those that transformers makes up to warm up
        return (0.0, 0.0), (0, 0)
    if settings.temperature == 0:
        return (0.0, 0.0), (0, 0)
    block, place = divmod(state.position_offset, _BLOCK)
    words = _words_of_block(settings.seed, settings.copy_of(state.request_id), block)[place]
    return (max(settings.temperature, rule.COLDEST), settings.top_p), words


@functools.lru_cache(maxsize=4096)
def _words_of_block(seed: int, copy: int, block: int) -> list[tuple[int, int]]:
    """The key and the salt of `_BLOCK` positions."""
    positions = np.arange(block * _BLOCK, (block + 1) * _BLOCK)[None]
    return [(key, salt) for key, salt in keys_at(positions, np.array([copy]), seed_words([seed]))[0].tolist()]
