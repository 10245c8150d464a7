"""Whole runs with a model: this package's `generate` against a bare loop, transformers' recipe and the reference."""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers

from hf_llama_sampling import PromptCache, with_llama_generation
from hf_llama_sampling.generation.inputs import left_padded
from hf_llama_sampling.generation.releases import CACHE_NAME
from hf_llama_sampling.reference import reference_generate

from .measure import Effort, Line, in_turn, line, seconds

TEMPERATURE, TOP_P = 0.6, 0.9


class Models(NamedTuple):
    """One model twice, weights shared, and a text to cut prompts from."""

    ours: Any
    theirs: Any  # transformers' own class, told to sample as we do and to stop at no token
    text: list[int]

    @classmethod
    def of(cls, model: Any, text: list[int]) -> "Models":
        """No token ends a row: both sides make as many, whatever they draw."""
        model.generation_config = transformers.GenerationConfig(
            do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0, pad_token_id=0
        )
        model.config.eos_token_id = None
        ours = with_llama_generation(copy.copy(model))
        ours.generation_config = transformers.GenerationConfig()
        return cls(ours, model, text)

    def prompts(self, lengths: list[int]) -> list[list[int]]:
        """Prompts of these lengths, each from another place of the text."""
        step = max(1, (len(self.text) - max(lengths)) // len(lengths))
        prompts = [self.text[row * step : row * step + length] for row, length in enumerate(lengths)]
        assert [len(prompt) for prompt in prompts] == lengths, "the text is too short"
        return prompts


@torch.no_grad()
def bare_loop(model: Any, ids: torch.Tensor, steps: int, *, cache: Any = None, last_only: bool = False) -> torch.Tensor:
    """The least that generates: forward and argmax over a cache. ids: (B, T), what the cache does not hold yet.

    `last_only`: ask the model for the last position's logits only, also of the prompt; else plainly for all.
    """
    made = []
    for _ in range(steps):
        output = model(ids, use_cache=True, **{CACHE_NAME: cache}, **({"logits_to_keep": 1} if last_only else {}))
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        made.append(ids)
    return torch.cat(made, dim=1)


@torch.no_grad()
def transformers_recipe(model: Any, ids: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled tokens and all logprobs, as transformers offers them: `output_logits`, and a forward for the prompt."""
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        output_logits=True,
        return_dict_in_generate=True,
    )
    made = output.sequences[:, ids.shape[1] :]
    new = [
        logits.log_softmax(-1).gather(-1, made[:, step, None])  # one by one: stacked they would take thrice the memory
        for step, logits in enumerate(output.logits)
    ]
    prompt = model(ids[:, :-1], use_cache=False).logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return made, torch.cat([prompt, *new], dim=1)


def ours_with_logprobs(models: Models, prompts: list[list[int]], steps: int, **options: Any) -> Any:
    """The same work here."""
    output = models.ours.generate(
        prompts, max_gen_len=steps, temperature=TEMPERATURE, top_p=TOP_P, logprobs=True, echo=True, **options
    )
    assert [len(row) for row in output.logprobs] == [len(prompt) + steps for prompt in prompts]
    return output


def with_logprobs_and_echo(
    models: Models, effort: Effort, *, steps: int, cases: Sequence[tuple[int, int]]
) -> Iterator[Line]:
    """Sampling with logprobs and echo against forward + argmax, and against transformers' recipe.

    The bare loop against that recipe is what no sampling on these forwards can be below.
    """
    for batch, length in cases:
        prompts = models.prompts([length] * batch)
        ids = torch.tensor(prompts)
        runs = [
            lambda prompts=prompts: ours_with_logprobs(models, prompts, steps),
            lambda prompts=prompts: ours_with_logprobs(models, prompts, steps, seeds=0),
            lambda ids=ids: bare_loop(models.theirs, ids, steps),
            lambda ids=ids: bare_loop(models.theirs, ids, steps, last_only=True),
            lambda ids=ids: transformers_recipe(models.theirs, ids, steps),
        ]
        *ours, bare, bare_last_only, recipe = in_turn(runs, effort)
        for stream, times in zip(("Meta's stream", "one stream per prompt"), ours, strict=True):
            what = f"{steps} tokens with logprobs and echo, {stream}, B = {batch}, prompts of {length}"
            yield line(what, "a bare loop of forward + argmax", 1.08, times, bare)
            yield line(what, "the same, spared the logits of the prompt", None, times, bare_last_only)
            target = 0.6 if (batch, length) == (8, 256) else None
            yield line(what, "transformers: `output_logits` and a forward", target, times, recipe)
        what = f"the bare loop itself, no sampling and no logprobs, B = {batch}, prompts of {length}"
        yield line(what, "transformers: `output_logits` and a forward", None, bare, recipe)


def forwards_alone(models: Models, effort: Effort, *, steps: int, case: tuple[int, int]) -> Iterator[Line]:
    """How much of the time with logprobs and echo is the model's, whatever samples and scores around it."""
    batch, length = case
    prompts = models.prompts([length] * batch)
    marks: list[float] = []
    hooks = [
        models.ours.register_forward_pre_hook(lambda *_: marks.append(effort.clock())),
        models.ours.register_forward_hook(lambda *_: marks.append(effort.clock())),
    ]
    times: list[tuple[float, float]] = []
    for _ in range(effort.least + 1):
        marks.clear()
        whole = seconds(lambda: ours_with_logprobs(models, prompts, steps, seeds=0), effort.clock)
        times.append((sum(marks[1::2]) - sum(marks[::2]), whole))
    for hook in hooks:
        hook.remove()
    what = f"the model's forwards alone, {steps} tokens with logprobs and echo, B = {batch}, prompts of {length}"
    yield line(what, "all of the same run", None, *zip(*times[1:], strict=True))  # the first one is cold


def one_token(models: Models, effort: Effort, *, cases: Sequence[tuple[int, int]]) -> Iterator[Line]:
    """One new token with logprobs and echo, against one forward over the prompt with all its logits."""
    for batch, length in cases:
        prompts = models.prompts([length] * batch)
        ids = torch.tensor(prompts)

        def theirs(ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                models.theirs(ids)

        runs = [lambda prompts=prompts: ours_with_logprobs(models, prompts, 1, seeds=0), theirs]
        what = f"one new token with logprobs and echo, B = {batch}, prompts of {length}"
        yield line(what, "one forward over the prompt with all its logits", 1.1, *in_turn(runs, effort))


class Chat(NamedTuple):
    """The turn of a conversation that is measured, and the tokens that each turn adds."""

    turn: int
    tokens: int


def chat(models: Models, effort: Effort, case: Chat) -> Iterator[Line]:
    """The time to the first token of a turn that goes on from the cache of the turns before it."""
    prompt = models.prompts([case.turn * case.tokens])[0]
    read = PromptCache()
    first_token = {"max_gen_len": 1, "temperature": TEMPERATURE, "top_p": TOP_P, "seeds": 0}
    models.ours.generate([prompt[: -case.tokens]], **first_token, prompt_cache=read)
    before = read._kept

    def turn() -> Any:
        read._kept = before  # the same turn again
        return models.ours.generate([prompt], **first_token, prompt_cache=read)

    assert turn().tokens == models.ours.generate([prompt], **first_token).tokens
    runs = [turn, lambda: models.ours.generate([prompt], **first_token)]
    what = f"turn {case.turn} of a chat, {case.tokens} tokens a turn: time to the first token"
    yield line(what, "the same turn from scratch", 0.25, *in_turn(runs, effort))


class Ragged(NamedTuple):
    """A ragged batch: prompts from `shortest` to `longest` tokens, and so many new ones."""

    rows: int
    longest: int
    new: int
    shortest: int = 16

    def __str__(self) -> str:
        return f"ragged batch of {self.rows}, {self.shortest} to {self.longest}, {self.new} new tokens"

    def lengths(self) -> list[int]:
        """Evenly spread, in an order that is not theirs."""
        steps = self.rows - 1
        spread = [self.shortest + (self.longest - self.shortest) * row // steps for row in range(self.rows)]
        return spread[::2] + spread[1::2]


def ragged_against_transformers(models: Models, effort: Effort, batch: Ragged) -> Iterator[Line]:
    """A ragged batch with seeds against transformers on the same batch, left-padded, which makes no logprobs."""
    prompts = models.prompts(batch.lengths())
    ids, mask = left_padded(prompts)

    def ours(**options: Any) -> Any:
        return models.ours.generate(
            prompts, max_gen_len=batch.new, temperature=TEMPERATURE, top_p=TOP_P, seeds=0, **options
        )

    runs = [
        ours,
        lambda: ours(logprobs=True),
        lambda: ours(logprobs=True, echo=True),
        lambda: models.theirs.generate(ids, attention_mask=mask, max_new_tokens=batch.new),
    ]
    plain, logprobs, echo, theirs = in_turn(runs, effort)
    what = f"{batch}, one stream per prompt"
    against = "transformers, left-padded, no logprobs"
    yield line(what, against, 1.0, plain, theirs)
    yield line(f"{what}, logprobs", against, 1.0, logprobs, theirs)
    yield line(f"{what}, logprobs and echo", against, None, echo, theirs)


def ragged_against_the_reference(models: Models, effort: Effort, batch: Ragged) -> Iterator[Line]:
    """The same on Meta's stream against the reference's own schedule: no padding, a column at a time."""
    prompts = models.prompts(batch.lengths())

    def ours(schedule: str) -> Any:
        return models.ours.generate(
            prompts, max_gen_len=batch.new, temperature=TEMPERATURE, top_p=TOP_P, schedule=schedule
        )

    def reference() -> Any:
        return reference_generate(
            models.theirs,
            prompts,
            max_gen_len=batch.new,
            max_seq_len=batch.longest + batch.new,
            eos_ids=[],
            top_p=TOP_P,
        )

    padded, dense, loop = in_turn([lambda: ours("auto"), lambda: ours("reference"), reference], effort)
    what = f"{batch}, Meta's stream"
    yield line(what, 'the reference\'s schedule at its best: `schedule="reference"`', 0.25, padded, dense)
    yield line(what, "the reference's loop", 0.25, padded, loop)


def cached(models: Models, length: int) -> tuple[torch.Tensor, Callable[[], Any]]:
    """A prompt (1, length), and the cache of all of it but the last token, as good as new at each call."""
    ids = torch.tensor(models.prompts([length]))
    with torch.no_grad():
        cache = models.theirs(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

    def again() -> Any:
        if extra := cache.get_seq_length() - (length - 1):
            cache.crop(-extra)  # a negative number is how many to remove
        return cache

    return ids, again


def continued(models: Models, ids: torch.Tensor, cache: Callable[[], Any], steps: int) -> Any:
    """Sampling with logprobs after a cached prompt."""
    return models.ours.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache(),
        max_gen_len=steps,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        logprobs=True,
        seeds=0,
    )


def time_against_length(models: Models, effort: Effort, *, lengths: tuple[int, int], steps: int) -> Iterator[Line]:
    """How much dearer a token is after a long text than after a short one, relative to the bare loop's own ratio."""
    prompts = [cached(models, length) for length in lengths]

    def ours(ids: torch.Tensor, cache: Callable[[], Any]) -> None:
        continued(models, ids, cache, steps)

    def bare(ids: torch.Tensor, cache: Callable[[], Any]) -> None:
        bare_loop(models.theirs, ids[:, -1:], steps, cache=cache())

    def growth(run: Any) -> float:
        short, long = (seconds(lambda ids=ids, cache=cache: run(ids, cache), effort.clock) for ids, cache in prompts)
        return long / short

    growths: list[tuple[float, float]] = []
    for turn in range(effort.pairs):
        mine, other = [growth(run) for run in ((ours, bare) if turn % 2 else (bare, ours))][:: 1 if turn % 2 else -1]
        growths.append((mine, other))
    what = f"time per new token at length {lengths[1]:,} against length {lengths[0]:,}"
    measured = line(what, "the bare loop's own ratio", 1.02, *zip(*growths, strict=True))
    mine, other = (statistics.median(column) for column in zip(*growths, strict=True))
    # The fastest runs of two lengths do not make a pair.
    yield measured._replace(note=f"{mine:.3f} against {other:.3f}, {len(growths)} pairs", fastest=None)


def scoring(models: Models, effort: Effort, *, cases: Sequence[tuple[int, int]]) -> Iterator[Line]:
    """`score_tokens` against a plain forward with log_softmax over all of it."""
    for batch, length in cases:
        prompts = models.prompts([length] * batch)
        runs = [
            lambda prompts=prompts: models.ours.score_tokens(prompts),
            lambda prompts=prompts: plain_scores(models.theirs, prompts),
        ]
        yield line(
            f"score_tokens, B = {batch}, {length} tokens", "a forward and log_softmax", None, *in_turn(runs, effort)
        )


@torch.no_grad()
def plain_scores(model: Any, prompts: list[list[int]]) -> list[list[float]]:
    """The plain way to score texts of one length."""
    ids = torch.tensor(prompts)
    logprobs = model(ids[:, :-1], use_cache=False).logits.log_softmax(-1)
    return logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1).tolist()
