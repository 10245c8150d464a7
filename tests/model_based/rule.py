"""The rule for one row, in plain Python over whole forwards: no cache, no padding, no batch. What a call should give.

Where two computations of the same logits could draw differently (a near tie, a token on the nucleus' edge), the row is
marked as open, and nothing is claimed of it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from hf_llama_sampling import LlamaForCausalLM, LlamaSampler

VOCAB, CONTEXT = 40, 64
Draw = Callable[[list[int], torch.Tensor], int]  # text, edited logits (V,): the next token
Edit = Callable[[list[int], torch.Tensor, "Row"], torch.Tensor]
# Two layers are some twelve products in a row, each a sum of at most 64 terms rounded by half a float32 step, and as
# much again for the sum over the vocabulary; edits and temperatures scale it.
STEPS = 2 * 384


@functools.cache
def tiny() -> Any:
    """A random model of 40 tokens, so that an EOS comes often."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@functools.lru_cache(maxsize=20_000)
def logits_after(text: tuple[int, ...]) -> torch.Tensor:
    """(T, V): the raw logits of one forward, each row after a token of the text."""
    with torch.no_grad():
        return tiny()(torch.tensor([text]), use_cache=False).logits[0]


def rounding(logits: torch.Tensor) -> float:
    """How far another computation of these logits may be off."""
    return STEPS * torch.finfo(torch.float32).eps * max(1.0, float(logits[logits.isfinite()].abs().max()))


@dataclass
class Row:
    """One row as it grows."""

    prompt: list[int]
    limit: int
    made: list[int] = field(default_factory=list)
    tables: list[torch.Tensor] = field(default_factory=list)  # per new token, the (V,) logits that it was drawn from
    sampled: list[float] = field(default_factory=list)  # per new token, its logprob after temperature and nucleus
    reason: str = "length"
    open: bool = False  # rounding could have drawn another token
    empty: bool = False  # the edits leave nothing to draw

    @property
    def text(self) -> list[int]:
        """Prompt and completion."""
        return self.prompt + self.made


def meta_draw(noise: torch.Tensor, temperature: float, top_p: float) -> Draw:
    """The reference's draw with given Exp(1) values (V,), indexed by rank."""

    def draw(text: list[int], logits: torch.Tensor) -> int:
        probs, ids = torch.sort(torch.softmax(logits / temperature, -1), descending=True)
        probs = torch.where(probs.cumsum(-1) - probs > top_p, 0.0, probs)
        return int(ids[(probs / probs.sum() / noise).argmax()])

    return draw


def seeded_draw(seed: int, temperature: float, top_p: float) -> Draw:
    """The draw of the public sampler on one row."""
    sampler = LlamaSampler(temperature, top_p, seeds=[seed])
    return lambda text, logits: int(sampler(torch.tensor([text]), logits[None]).argmax())


def greedy(text: list[int], logits: torch.Tensor) -> int:
    """The best token."""
    return int(logits.argmax())


def nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> dict[int, float]:
    """The kept tokens and their probabilities after renormalizing; the best one alone where greedy."""
    if temperature == 0:
        return {int(logits.argmax()): 1.0}
    probs, ids = torch.sort(torch.softmax(logits.double() / temperature, -1), descending=True)
    kept = probs.cumsum(-1) - probs <= top_p
    total = float(probs[kept].sum())
    return {int(i): float(p) / total for i, p in zip(ids[kept], probs[kept], strict=True)}


def grow(
    row: Row,
    draws: Sequence[Draw],
    temperature: float,
    top_p: float,
    *,
    eos: Sequence[int],
    edits: Sequence[Edit],
    ends: Callable[[list[int]], bool],
) -> None:
    """Add tokens to a row until it ends; `draws` has one function per new token."""
    generator = torch.Generator().manual_seed(0)
    for draw in draws[: row.limit]:
        raw = logits_after(tuple(row.text))[-1]
        logits = functools.reduce(lambda scores, edit: edit(row.text, scores, row), edits, raw.clone())
        row.empty = not logits.isfinite().any()
        if row.empty:
            return
        token = greedy(row.text, logits) if temperature == 0 else draw(row.text, logits)
        kept = nucleus(logits, temperature, top_p)
        row.open |= token not in kept
        for _ in range(4):
            other = logits + rounding(raw) * (torch.randint(0, 2, logits.shape, generator=generator) * 2 - 1)
            again = greedy(row.text, other) if temperature == 0 else draw(row.text, other)
            row.open |= again != token or nucleus(other, temperature, top_p).keys() != kept.keys()
        if row.open:
            return
        row.made.append(token)
        row.tables.append(torch.log_softmax(logits, -1))
        row.sampled.append(0.0 if temperature == 0 else float(torch.tensor(kept[token]).log()))
        if token in eos or ends(row.text):
            row.reason = "stop"
            return


# --- options that edit logits, as transformers documents them, each on one row's own text -----------------------------


def repetition_penalty(penalty: float) -> Edit:
    """Divide positive scores of tokens in the text by the penalty, multiply negative ones."""

    def edit(text: list[int], scores: torch.Tensor, row: Row) -> torch.Tensor:
        for token in set(text):
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        return scores

    return edit


def no_repeat_ngram(size: int) -> Edit:
    """Forbid a token that would repeat an n-gram of the text."""

    def edit(text: list[int], scores: torch.Tensor, row: Row) -> torch.Tensor:
        tail = text[len(text) - size + 1 :]
        for start in range(len(text) - size + 1):
            if text[start : start + size - 1] == tail:
                scores[text[start + size - 1]] = -torch.inf
        return scores

    return edit


def bad_words(words: Sequence[Sequence[int]], eos: Sequence[int]) -> Edit:
    """Forbid the last token of a word whose first ones end the text; EOS alone is no bad word."""

    def edit(text: list[int], scores: torch.Tensor, row: Row) -> torch.Tensor:
        for *first, last in words:
            alone = not first and last in eos
            if not alone and len(text) >= len(first) and text[len(text) - len(first) :] == list(first):
                scores[last] = -torch.inf
        return scores

    return edit


def min_new_tokens(least: int, eos: Sequence[int]) -> Edit:
    """Forbid every EOS among the first tokens."""

    def edit(text: list[int], scores: torch.Tensor, row: Row) -> torch.Tensor:
        if len(row.made) < least:
            scores[list(eos)] = -torch.inf
        return scores

    return edit


def suppress(tokens: Sequence[int], *, first_only: bool = False) -> Edit:
    """Forbid some tokens, everywhere or as a completion's first."""

    def edit(text: list[int], scores: torch.Tensor, row: Row) -> torch.Tensor:
        if not first_only or not row.made:
            scores[list(tokens)] = -torch.inf
        return scores

    return edit


def forced_eos(token: int) -> Edit:
    """The last token that a row's limit allows."""

    def edit(text: list[int], scores: torch.Tensor, row: Row) -> torch.Tensor:
        if len(row.made) == row.limit - 1:
            scores[:] = -torch.inf
            scores[token] = 0.0
        return scores

    return edit


def by_text(bias: Callable[[list[int]], torch.Tensor]) -> Edit:
    """A processor of the caller's: a bias that is a function of the row's text."""
    return lambda text, scores, row: scores + bias(text)
