"""What is held and what is waited for: counts that do not depend on the machine's mood."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from transformers.cache_utils import DynamicLayer

from hf_llama_sampling.generation.inputs import left_padded
from hf_llama_sampling.sampling import fast_path
from hf_llama_sampling.sampling.streams import LookAhead

from .loops import TEMPERATURE, TOP_P, Models, Ragged, ours_with_logprobs, plain_scores, transformers_recipe
from .measure import Line, Waits, peak_bytes
from .sharing import Choices, questions

VOCAB = 49_152  # of the 135M model


class Batch(NamedTuple):
    """Rows of one length: so many tokens of prompt, and so many new ones."""

    rows: int
    prompt: int
    new: int


def wide_models(positions: int) -> Models:
    """A body of one tiny layer under a real vocabulary: logits and logprobs take the memory they would anywhere."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    return Models.of(model, torch.randint(VOCAB, (4 * positions,)).tolist())


def deep_models(positions: int) -> Models:
    """A body whose caches outweigh its logits."""
    config = transformers.LlamaConfig(
        vocab_size=500,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=positions,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    return Models.of(model, torch.randint(500, (4 * positions,)).tolist())


def column_bytes(model: Any) -> int:
    """What one column of one row's cache takes, in float32."""
    config = model.config
    return int(2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim)


def shared_prefix(models: Models, length: int) -> Iterator[Line]:
    """What two samples of a prompt take beyond one of it, against one copy of the prompt's cache per row."""
    prompt = models.prompts([length])

    def samples(copies: int) -> Any:
        return models.ours.generate(prompt, max_gen_len=4, seeds=0, num_return_sequences=copies, share_prefix=True)

    samples(2)  # the trials of a first call are over
    one, two = (peak_bytes(lambda copies=copies: samples(copies)) for copies in (1, 2))
    copies = 2 * length * column_bytes(models.ours)
    what = f"two samples' extra peak memory, one prompt of {length}"
    note = f"{_mib(two - one)} against {_mib(copies)}"
    yield Line(what, "one copy of the prompt's cache per row", 1.0, (two - one) / copies, note=note)


@contextlib.contextmanager
def counted_caches() -> Iterator[list[int]]:
    """The most bytes that caches held at once, after each layer's update, as the one item of a list."""
    alive: list[weakref.ref[Any]] = []
    peak = [0]
    update = DynamicLayer.update

    def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        states = update(layer, *args, **kwargs)
        alive.extend(weakref.ref(tensor.untyped_storage()) for tensor in states)
        storages = [storage for ref in alive if (storage := ref()) is not None]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        peak[0] = max(peak[0], sum(held.values()))
        return states

    with mock.patch.object(DynamicLayer, "update", counted):
        yield peak


def tree(models: Models, case: Choices, columns: Sequence[int]) -> Iterator[Line]:
    """The caches that a walk over a tree of prompts holds, against its budget of so many columns."""
    contexts, continuations = questions(models, case)
    for count in columns:
        budget = count * column_bytes(models.ours)
        with counted_caches() as peak:
            models.ours.score_continuations(contexts, continuations, cache_bytes=budget)
        what = f"caches held, {case}, budget of {count:,} columns"
        yield Line(what, "`cache_bytes`", 1.0, peak[0] / budget, note=f"{_mib(peak[0])} against {_mib(budget)}")


def logprobs_and_echo(models: Models, batch: Batch) -> Iterator[Line]:
    """Extra peak for logprobs and echo against transformers' recipe, each over its own plain sampling."""
    ours = extra_of_ours(models, batch)
    ids = torch.tensor(models.prompts([batch.prompt] * batch.rows))
    theirs = peak_bytes(lambda: transformers_recipe(models.theirs, ids, batch.new)) - peak_bytes(
        lambda: models.theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=batch.new)
    )
    shape = f"B = {batch.rows}, {batch.prompt} + {batch.new} tokens, V = {VOCAB:,}"
    what = f"extra peak memory for logprobs and echo, {shape}"
    yield Line(what, "transformers' recipe", 0.1, ours / theirs, note=f"{_mib(ours)} against {_mib(theirs)}")


def four_times_the_length(models: Models, batch: Batch) -> Iterator[Line]:
    """The same at four times the length: linear in tokens is at most four times as much."""
    long = batch._replace(prompt=4 * batch.prompt, new=4 * batch.new)
    once, fourfold = extra_of_ours(models, batch), extra_of_ours(models, long)
    what = f"the same at four times the length, {long.prompt} + {long.new} tokens"
    note = f"{_mib(fourfold)} against {_mib(once)}"
    yield Line(what, f"{batch.prompt} + {batch.new} tokens", 4.0, fourfold / once, note=note)


def extra_of_ours(models: Models, batch: Batch) -> int:
    """Bytes that logprobs and echo add to this package's peak."""
    prompts = models.prompts([batch.prompt] * batch.rows)

    def plain() -> Any:
        return models.ours.generate(prompts, max_gen_len=batch.new, temperature=TEMPERATURE, top_p=TOP_P)

    return peak_bytes(lambda: ours_with_logprobs(models, prompts, batch.new)) - peak_bytes(plain)


def scoring(models: Models, *, batch: int, length: int) -> Iterator[Line]:
    """`score_tokens` against a plain forward with log_softmax over all of it."""
    prompts = models.prompts([length] * batch)
    ours = peak_bytes(lambda: models.ours.score_tokens(prompts))
    theirs = peak_bytes(lambda: plain_scores(models.theirs, prompts))
    what = f"score_tokens, peak memory, B = {batch}, {length} tokens, V = {VOCAB:,}"
    yield Line(what, "a forward and log_softmax", None, ours / theirs, note=f"{_mib(ours)} against {_mib(theirs)}")


def look_ahead(longests: Sequence[int], *, rows: int = 8, vocab: int = 128_256) -> Iterator[Line]:
    """What the padded schedule holds of Meta's stream, against keeping whole what it drew ahead."""
    for longest in longests:
        batch = Ragged(rows, longest, new=3)

        def draw(batch: Ragged = batch) -> None:
            stream = LookAhead(batch.lengths(), batch.longest, torch.Generator().manual_seed(0))
            for column in range(batch.longest, batch.longest + batch.new):
                stream.step((rows, vocab), torch.device("cpu"), column)

        held, whole = peak_bytes(draw), 4 * rows * vocab * (longest - batch.shortest + 1)
        what = f"the look-ahead's memory, B = {rows}, lengths {batch.shortest} to {longest:,}, V = {vocab:,}"
        note = f"{_mib(held)} against {_mib(whole)}"
        yield Line(what, "whole blocks of draws", None, held / whole, note=note)


def device_waits(models: Models) -> Iterator[Line]:
    """Operations per decode step that would wait for a device, on the path that a device takes.

    With padding, transformers asks its mask in each step as well, under this package as under its own `generate`.
    """
    for layout, lengths in (("one length", [16, 16]), ("ragged, padded", [16, 9])):
        prompts = models.prompts(lengths)
        ids, mask = left_padded(prompts)

        def theirs(new: int, ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
            models.theirs.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)

        own_waits, own_operations = _per_step(theirs)
        for stream, options in (("Meta's stream", {}), ("one stream per prompt", {"seeds": 0})):

            def ours(new: int, prompts: list[list[int]] = prompts, options: dict[str, Any] = options) -> None:
                models.ours.generate(prompts, max_gen_len=new, logprobs=True, **options)

            waits, operations = _per_step(ours)
            what = f"waits for the device per decode step, {layout}, {stream}"
            more = f"{own_waits:g} of them transformers', {operations - own_operations:.0f} operations more than greedy"
            yield Line(what, "-", 1.0, waits, note=more)


def _per_step(run: Callable[[int], None]) -> tuple[float, float]:
    """Waits and operations per step of a run of so many steps, as where neither NumPy nor a look at a value will do."""
    counts = []
    with mock.patch.object(fast_path, "on_cpu", lambda values: False):
        run(4)  # what is done once in a process
        for new in (4, 20):
            with Waits() as counted:
                run(new)
            counts.append((len(counted.waits), counted.operations))
    (few_waits, few), (many_waits, many) = counts
    return (many_waits - few_waits) / 16, (many - few) / 16


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
