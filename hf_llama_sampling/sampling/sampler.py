"""One step of sampling as one callable: logits in, a token per row out.

What this module does not do: it holds no rule (see `rule`), makes no random numbers (see `streams`), and does not know
transformers or where a text ends.
"""

import math

import torch
from torch import Tensor

from ..checks import check_generator
from . import fast_path, rule
from .rule import Draw
from .settings import SamplingSettings
from .streams import LookAhead, MetaStream, PromptStreams

Stream = MetaStream | LookAhead | PromptStreams


class TokenSampler:
    """Draw with frozen settings and one stream: scale, keep the nucleus, race.

    Settings reach the device once, here: a copy from the host in every step would make the host wait for the device.

    Args:
        settings: for `rows` rows, one value for all or one per row.
        stream: the random numbers; its kind decides whether noise belongs to ranks or to token ids.
        rows: B.
        device: of the logits.

    Raises:
        ValueError: settings for another number of rows, or a generator of another device.

    >>> sampler = TokenSampler(SamplingSettings(0.0), MetaStream(None), rows=1, device=torch.device("cpu"))
    >>> sampler(torch.tensor([[0.0, 2.0, 1.0]]), column=5).tokens
    tensor([1])
    """

    def __init__(self, settings: SamplingSettings, stream: Stream, *, rows: int, device: torch.device) -> None:
        check_generator(settings.generator, device)
        settings = settings.for_rows(rows)
        self.stream = stream
        self.all_greedy = settings.greedy
        self.greedy_rows: Tensor | None = None  # (B,) bool, where greedy and sampled rows share the batch
        self.temperature = _on_device(settings.temperature, device)
        if isinstance(settings.temperature, tuple) and 0 in settings.temperature and not self.all_greedy:
            self.greedy_rows = torch.tensor([value == 0 for value in settings.temperature], device=device)
            # Greedy rows race like the others, as in the reference each row draws in each step; any temperature does.
            sampled = max(settings.temperature)
            self.temperature = _on_device(_merge([value or sampled for value in settings.temperature]), device)
        self.top_p = _on_device(settings.top_p, device)

    def __call__(self, logits: Tensor, column: int, *, with_mass: bool = True) -> Draw:
        """Draw the tokens that come to stand in `column`.

        Args:
            logits: (B, V) float32.
            with_mass: whether the draw's probabilities are wanted; a greedy token's is 1.
        """
        if self.all_greedy:
            tokens = logits.argmax(-1)
            return _certain(tokens, logits.gather(1, tokens[:, None]).squeeze(1), with_mass)
        path = fast_path if fast_path.on_cpu(logits) else rule
        noise = self.stream.step(logits.shape, logits.device, column)
        probs = path.softmax_with_temperature(logits, self.temperature)
        draw: Draw
        if self.stream.by_rank:
            draw = path.draw_by_rank(probs, self.top_p, noise)
        else:
            draw = path.draw_by_token(probs, self.top_p, noise, with_mass=with_mass)
        if self.greedy_rows is None:
            return draw
        best = _certain(logits.argmax(-1), draw.softmax_probs, with_mass)
        mass = draw.nucleus_mass
        if mass is not None and best.nucleus_mass is not None:
            mass = torch.where(self.greedy_rows, best.nucleus_mass, mass)
        tokens = torch.where(self.greedy_rows, best.tokens, draw.tokens)
        return Draw(tokens, torch.where(self.greedy_rows, best.softmax_probs, draw.softmax_probs), mass)


def _certain(tokens: Tensor, values: Tensor, with_mass: bool) -> Draw:
    """Tokens (B,) that were not drawn: probability 1, or nan where their `values` (B,) are nan or infinite."""
    ones = values * 0.0 + 1.0
    return Draw(tokens, ones, ones if with_mass else None)


def _merge(values: list[float]) -> float | tuple[float, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)


def _on_device(value: object, device: torch.device) -> float | Tensor:
    """A shared setting as a number, one per row as a tensor (B, 1).

    On CUDA a division by a number and one by a tensor round differently, and the reference divides by a number.
    """
    if isinstance(value, tuple):
        return torch.tensor(value, dtype=torch.float32, device=device)[:, None]
    assert isinstance(value, float)
    return value


def one_hot(tokens: Tensor, scores: Tensor) -> Tensor:
    """(B, V) float32: 0 at `tokens` (B,), -inf elsewhere, so that argmax and softmax both give the token."""
    row = torch.full(scores.shape, -math.inf, dtype=torch.float32, device=scores.device)
    return row.scatter_(1, tokens[:, None], 0.0)
