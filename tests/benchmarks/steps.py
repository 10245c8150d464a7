"""What a step costs beside the model: its time around the bundled tiny model, and its operations."""

import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import transformers

from hf_llama_sampling.sampling import fast_path

from ..conftest import TINY
from ..generation.helpers import Count
from .loops import TEMPERATURE, TOP_P, Models
from .measure import Effort, Line, in_turn, line

PROMPT = 16  # tokens
STREAMS: dict[str, dict[str, Any]] = {"Meta's stream": {}, "one stream per prompt": {"seeds": 0}}
AT_MOST = {1: 1.0, 8: 0.9}  # by rows


def tiny_models() -> Models:
    """The bundled model: its forward takes so little that all around it shows."""
    model = transformers.LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    return Models.of(copy.copy(model), list(range(3, 1003)))


def overhead(models: Models, effort: Effort, *, steps: int) -> Iterator[Line]:
    """Sampled tokens of the tiny model on one thread against transformers' own sampled `generate`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for rows, at_most in AT_MOST.items():
            prompts = models.prompts([PROMPT] * rows)
            runs = [_ours(models, prompts, steps, asked) for asked in STREAMS.values()]
            *ours, theirs = in_turn([*runs, _theirs(models, prompts, steps)], effort)
            for stream, times in zip(STREAMS, ours, strict=True):
                what = f"{steps} tokens of the tiny model, {stream}, B = {rows}, one thread"
                yield line(what, "transformers' own sampled `generate`", at_most, times, theirs)
    finally:
        torch.set_num_threads(threads)


def operations(models: Models) -> Iterator[Line]:
    """Tensor operations of a decode step beyond those of transformers' own sampled loop; logprobs off."""
    prompts = models.prompts([PROMPT] * 3)
    for path, on_cpu, at_most in (("on CPU", True, 30.0), ("on other devices", False, 20.0)):
        with mock.patch.object(fast_path, "on_cpu", fast_path.on_cpu if on_cpu else lambda values: False):
            theirs = per_step(lambda steps: _theirs(models, prompts, steps))
            for stream, asked in STREAMS.items():
                ours = per_step(lambda steps, asked=asked: _ours(models, prompts, steps, asked))
                what = f"tensor operations per decode step beyond transformers' own, {stream}, path {path}"
                note = f"{ours:.0f} and {theirs:.0f}, views apart"
                yield Line(what, "transformers' own sampled `generate`", at_most, ours - theirs, note=note)


def per_step(run: Callable[[int], Callable[[], Any]]) -> float:
    """Operations of one step of a run of so many steps."""
    counts = []
    for steps in (6, 22):
        torch.manual_seed(1)
        with Count() as count:
            run(steps)()
        counts.append(count.computed)
    return (counts[1] - counts[0]) / 16


def _ours(models: Models, prompts: list[list[int]], steps: int, asked: dict[str, Any]) -> Callable[[], Any]:
    settings = {"max_gen_len": steps, "temperature": TEMPERATURE, "top_p": TOP_P, **asked}
    return lambda: models.ours.generate(prompts, **settings)


def _theirs(models: Models, prompts: list[list[int]], steps: int) -> Callable[[], Any]:
    ids = torch.tensor(prompts)
    return lambda: models.theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps)
