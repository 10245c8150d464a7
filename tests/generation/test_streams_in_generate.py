"""Both contracts of random numbers, through `generate`: Meta's stream, and one stream per prompt."""

import random

import pytest
import torch

from hf_llama_sampling.reference import reference_generate
from tests.generation.helpers import EOS, OFTEN, RAGGED, SHORT, check_against_the_reference, close, random_case

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("part", range(10))
def test_random_ragged_batches_equal_the_reference(tiny_model, part):
    """200 in all, on Meta's stream: equal tokens in both schedules, logprobs within rounding, the generator's state."""
    draw = random.Random(part)
    for number in range(20):
        prompts, settings, eos = random_case(draw, 1024)
        check_against_the_reference(tiny_model, prompts, settings, eos, 1000 * part + number)


@pytest.mark.weights
def test_ragged_batches_on_the_real_weights_equal_the_reference(weights):
    """A handful on 135M weights and a vocabulary of 49,152."""
    draw = random.Random(5)
    for number in range(3):
        prompts = [[draw.randrange(1000) for _ in range(draw.randint(1, 8))] for _ in range(3)]
        settings = {
            "max_gen_len": 4,
            "max_seq_len": 2048,
            "temperature": 0.6,
            "top_p": 0.9,
            "echo": True,
            "logprobs": True,
        }
        check_against_the_reference(weights, prompts, settings, [EOS], number)


def test_a_prompt_of_the_whole_length_leaves_the_generator_as_the_reference_does(tiny_model):
    """It has nothing to generate, so no EOS of its own ends the reference's loop, whatever is drawn for it."""
    prompts, eos = [[1, 5, 6, 7, 8], [1, 5, 6, 7, 8, 9, 10, 11]], list(range(1024))
    theirs = torch.Generator().manual_seed(3)
    tokens, _ = reference_generate(tiny_model, prompts, max_gen_len=5, max_seq_len=8, eos_ids=eos, generator=theirs)
    for schedule in ("reference", "padded"):
        ours = torch.Generator().manual_seed(3)
        out = tiny_model.generate(
            prompts, max_gen_len=5, max_seq_len=8, eos_token_id=eos, generator=ours, schedule=schedule
        )
        assert out.tokens == tokens
        assert torch.equal(ours.get_state(), theirs.get_state()), schedule


def test_the_global_generator_is_metas_stream(tiny_model):
    """torch.manual_seed before the call, and the state after it, as with `generator=`."""
    for schedule in ("reference", "padded"):
        torch.manual_seed(12)
        by_global = tiny_model.generate(RAGGED, max_gen_len=6, schedule=schedule)
        state = torch.get_rng_state()
        generator = torch.Generator().manual_seed(12)
        assert (
            tiny_model.generate(RAGGED, max_gen_len=6, schedule=schedule, generator=generator).tokens
            == by_global.tokens
        )
        assert torch.equal(generator.get_state(), state)


def test_greedy_and_seeded_calls_leave_the_generators_alone(tiny_model):
    """They draw nothing from torch."""
    state = torch.get_rng_state()
    for asked in ({"temperature": 0}, {"seeds": 1}):
        for schedule in ("reference", "padded"):
            tiny_model.generate(RAGGED, max_gen_len=4, schedule=schedule, **asked)
    assert torch.equal(torch.get_rng_state(), state)


def check_independence(model, prompts, seeds, *, batches, max_gen_len, draw, eos):
    """The same seed and prompt alone, and in random batches, orders, schedules and chunks."""
    asked = {"max_gen_len": max_gen_len, "temperature": 0.8, "eos_token_id": eos, "logprobs": True, "echo": True}
    alone = [model.generate([p], seeds=[seed], **asked) for p, seed in zip(prompts, seeds, strict=True)]
    for size in batches:
        some = draw.sample(range(len(prompts)), size)
        out = model.generate(
            [prompts[i] for i in some],
            seeds=[seeds[i] for i in some],
            schedule=draw.choice(["reference", "padded", "auto"]),
            chunk_bytes=draw.choice([1, 100_000, 1 << 20, 64 << 20]),
            **asked,
        )
        assert out.tokens == [alone[i].tokens[0] for i in some]
        assert out.finish_reason == [alone[i].finish_reason[0] for i in some]
        close(out.logprobs, [alone[i].logprobs[0] for i in some])
        close(out.sampled_logprobs, [alone[i].sampled_logprobs[0] for i in some])


def test_a_completion_depends_on_its_seed_and_prompt_alone(tiny_model):
    """Alone, in batches of 2 to 16, in any order, reference or padded, prefilled in any chunks."""
    draw = random.Random(1)
    prompts = [[draw.randrange(1024) for _ in range(draw.randint(1, 25))] for _ in range(16)]
    seeds = [draw.getrandbits(64) for _ in range(14)] + [0, 2**64 - 1]
    check_independence(
        tiny_model,
        prompts,
        seeds,
        batches=[2, 3, 5, 8, 13, 16, 16, 2, 4, 4],
        max_gen_len=15,
        draw=draw,
        eos=[EOS, OFTEN],
    )


@pytest.mark.weights
def test_a_completion_depends_on_its_seed_and_prompt_alone_on_the_real_weights(weights):
    """The same on the 135M weights, in batches of 2 to 16."""
    draw = random.Random(2)
    prompts = [[draw.randrange(1000) for _ in range(draw.randint(1, 9))] for _ in range(16)]
    seeds = [5, 2**63, 7, 1, *range(100, 112)]
    check_independence(weights, prompts, seeds, batches=[2, 5, 16], max_gen_len=4, draw=draw, eos=[EOS])


def test_an_int_means_consecutive_seeds(tiny_model):
    """`seeds=7` is `[7, 8, 9]`; a prompt's own seed gives its row alone."""
    batch = tiny_model.generate([SHORT] * 3, max_gen_len=8, seeds=7).tokens
    assert tiny_model.generate([SHORT] * 3, max_gen_len=8, seeds=[7, 8, 9]).tokens == batch
    assert tiny_model.generate([SHORT], max_gen_len=8, seeds=9).tokens[0] == batch[2]
    assert len({tuple(row) for row in batch}) == 3


@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_num_return_sequences(tiny_model, schedule):
    """Copies stand beside each other and differ; the first is the prompt alone; settings per prompt go with it."""
    asked = {"max_gen_len": 10, "temperature": [0.9, 0.0, 1.2], "seeds": [3, 4, 5], "schedule": schedule}
    out = tiny_model.generate(RAGGED, num_return_sequences=3, **asked)
    single = tiny_model.generate(RAGGED, **asked)
    assert out.tokens[::3] == single.tokens
    for copies in (out.tokens[:3], out.tokens[6:]):
        assert len({tuple(row) for row in copies}) == 3
    assert out.tokens[3:6] == [single.tokens[1]] * 3
    assert out.sequences.shape[0] == 9
    assert out.settings["temperature"] == [0.9] * 3 + [0.0] * 3 + [1.2] * 3
    fewer = tiny_model.generate(RAGGED, num_return_sequences=2, **asked)
    assert fewer.tokens == [row for i, row in enumerate(out.tokens) if i % 3 < 2]


def test_num_return_sequences_on_metas_stream_repeats_rows(tiny_model):
    """As if each prompt had been written so many times."""
    torch.manual_seed(4)
    out = tiny_model.generate(RAGGED, max_gen_len=6, num_return_sequences=2)
    torch.manual_seed(4)
    assert out.tokens == tiny_model.generate([p for p in RAGGED for _ in range(2)], max_gen_len=6).tokens
