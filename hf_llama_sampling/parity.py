"""Check this package against the plain loop of `reference`, on the machine and device at hand.

What this module does not do: it measures no time, and it is not the test suite; it is for a user's own GPU.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .generation.model_info import eos_ids_of, vocab_size_of
from .reference import reference_generate, reference_sample_top_p
from .sampling.processors import sample_top_p

# A sum of n float32 terms, taken in another order, moves by about sqrt(n) steps of its size: 64 cover 4,096 terms.
_STEPS = 64
_EPSILON = 2.0**-23  # a float32 step at 1


class Check(NamedTuple):
    """One comparison of rows, and of the logprobs of rows that are equal."""

    name: str
    equal: int
    total: int
    difference: float | None = None  # the largest between two logprobs; None where none were compared
    size: float = 1.0  # of the largest logprob

    @property
    def passed(self) -> bool:
        """Whether all rows were equal, and all logprobs up to rounding."""
        return self.equal == self.total and (self.difference or 0.0) <= _STEPS * _EPSILON * max(1.0, self.size)

    def __str__(self) -> str:
        within = "" if self.difference is None else f", logprobs within {self.difference:.1e}"
        verdict = "ok" if self.passed else "DIFFERENT"
        return f"{self.name}: {self.equal} of {self.total} rows equal{within}: {verdict}"


def checks(model: Any, *, rows: int = 2000, batches: int = 8, seed: int = 0) -> Iterator[Check]:
    """Run every comparison on the model's device.

    Args:
        model: with `LlamaGenerationMixin`, in float32: 16-bit logits differ visibly between equal schedules.
        rows: random rows for the draw.
        batches: random ragged batches for generation.
        seed: of the prompts and the draws.
    """
    yield draws(model.device, rows, seed)
    for schedule in ("reference", "padded"):
        yield generation(model, schedule, batches, seed)
    yield streams(model, batches, seed)


def draws(device: torch.device, rows: int, seed: int) -> Check:
    """`sample_top_p` against the reference's, from the same generator state."""
    equal, total = 0, 0
    random = torch.Generator().manual_seed(seed)
    for top_p in (0.0, 0.5, 0.9, 1.0):
        for std in (0.5, 3.0):
            logits = torch.randn(max(1, rows // 8), 32000, generator=random) * std
            probs = torch.softmax(logits.to(device), dim=-1)
            ours, theirs = torch.Generator(device).manual_seed(seed), torch.Generator(device).manual_seed(seed)
            same = sample_top_p(probs, top_p, generator=ours) == reference_sample_top_p(probs, top_p, generator=theirs)
            equal, total = equal + int(same.sum()), total + len(same)
    return Check("draws against the reference", equal, total)


def generation(model: Any, schedule: str, batches: int, seed: int) -> Check:
    """Sampled ragged batches with echo and logprobs against the plain loop: rows with equal tokens."""
    equal, total, difference, size = 0, 0, 0.0, 1.0
    for batch, prompts in enumerate(_prompts(model, batches, seed)):
        settings: dict[str, Any] = {"max_gen_len": 24, "temperature": 0.8, "top_p": 0.9, "echo": True, "logprobs": True}
        ours = model.generate(
            prompts, **settings, schedule=schedule, compat="meta", generator=_generator(model, seed + batch)
        )
        tokens, logprobs = reference_generate(
            model,
            prompts,
            **settings,
            max_seq_len=ours.settings["max_seq_len"] or 10**9,
            eos_ids=eos_ids_of(model, {}),
            generator=_generator(model, seed + batch),
        )
        for row, reference in enumerate(tokens):
            same = ours.tokens[row] == reference
            equal, total = equal + same, total + 1
            if same and logprobs is not None:
                pairs = zip(ours.logprobs[row], logprobs[row], strict=True)
                difference = max([difference, *(abs(a - b) for a, b in pairs)])
                size = max([size, *(abs(value) for value in logprobs[row])])
    return Check(f"{schedule} generation against the reference", equal, total, difference, size)


def streams(model: Any, batches: int, seed: int) -> Check:
    """One stream per prompt: a prompt's completion alone against the one in a batch."""
    equal, total = 0, 0
    for prompts in _prompts(model, max(1, batches // 2), seed):
        together = model.generate(prompts, max_gen_len=24, seeds=seed).tokens
        for row, prompt in enumerate(prompts):
            equal += model.generate([prompt], max_gen_len=24, seeds=[seed + row]).tokens == [together[row]]
            total += 1
    return Check("a prompt alone against the same in a batch", equal, total)


def _generator(model: Any, seed: int) -> torch.Generator:
    return torch.Generator(model.device).manual_seed(seed)


def _prompts(model: Any, batches: int, seed: int) -> Iterator[list[list[int]]]:
    random = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        lengths = torch.randint(1, 24, (4,), generator=random).tolist()
        yield [torch.randint(3, vocab_size_of(model), (n,), generator=random).tolist() for n in lengths]
