"""`model.generate` and `score_tokens`: the promises of the class docstring, one by one."""

import copy
import math
import pickle
import random
import threading
import warnings

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, TextIteratorStreamer, TextStreamer
from transformers.utils import ModelOutput

from hf_llama_sampling import LlamaForCausalLM, LlamaGenerateOutput, LlamaGenerationMixin, LlamaSampler
from hf_llama_sampling import with_llama_generation as with_ours
from hf_llama_sampling.generation.loop import Step
from hf_llama_sampling.generation.options import HANDED_ON, READ_HERE
from hf_llama_sampling.reference import reference_generate
from hf_llama_sampling.sampling import fast_path as nucleus
from hf_llama_sampling.sampling import streams as noise
from tests.benchmarks.measure import Waits

BOS, EOS, OFTEN = 1, 2, 989  # 989 is a token that the bundled model likes
SHORT, LONG = [BOS, 5, 6], [BOS, 7, 8, 9, 10, 11, 12]
RAGGED = [SHORT, LONG, [BOS, 40]]


def padded(prompts, side, pad=0):
    """Ids and mask of a batch, padded on one side."""
    longest = max(map(len, prompts))

    def row(filler, items):
        gap = [filler] * (longest - len(items))
        return gap + items if side == "left" else items + gap

    mask = [row(0, [1] * len(prompt)) for prompt in prompts]
    return {
        "inputs": torch.tensor([row(pad, list(p)) for p in prompts]),
        "attention_mask": torch.tensor(mask),
    }


def close(ours, theirs, within=1e-4):
    """Rows of logprobs that agree; 1e-4 is the golden data's own bound."""
    assert [len(row) for row in ours] == [len(row) for row in theirs]
    assert all(
        abs(a - b) <= within for mine, yours in zip(ours, theirs, strict=True) for a, b in zip(mine, yours, strict=True)
    )


@torch.no_grad()
def plain_logprobs(model, tokens):
    """(T, V): log_softmax of one row's logits, each row under the token that it predicts; zeros for the first."""
    logits = model(torch.tensor([tokens])).logits[0].float()
    return torch.cat([torch.zeros(1, logits.shape[1]), torch.log_softmax(logits, dim=-1)[:-1]])


def at(logprobs, tokens):
    """The given tokens' entries."""
    return [float(logprobs[position, token]) for position, token in enumerate(tokens)]


# --- inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("schedule", ["reference", "padded"])
@pytest.mark.parametrize("pad", [0, EOS, BOS])
def test_a_padded_tensor_equals_lists(tiny_model, side, schedule, pad):
    """Padding is a mask, never inferred from ids: on either side, with any pad id, also one that stands in a prompt."""
    prompts = [[BOS, EOS, 0, 5], LONG, [pad, pad]]
    asked = {"max_gen_len": 6, "seeds": 3, "schedule": schedule, "echo": True, "logprobs": True}
    lists = tiny_model.generate(prompts, **asked)
    tensor = tiny_model.generate(**padded(prompts, side, pad), **asked)
    assert tensor.tokens == lists.tokens
    assert tensor.logprobs == lists.logprobs
    assert [row[: len(prompt)] for row, prompt in zip(lists.tokens, prompts, strict=True)] == prompts


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: tuple(map(tuple, rows)),
        lambda rows: [np.array(row) for row in rows],
        lambda rows: [torch.tensor(row) for row in rows],
        lambda rows: [[np.int64(token) for token in row] for row in rows],
        lambda rows: padded(rows, "left")["inputs"].to(torch.int32),
        lambda rows: padded(rows, "left")["inputs"].to(torch.uint8),
    ],
)
def test_prompts_come_in_many_kinds(tiny_model, make):
    """Tuples, arrays, tensors of any integer type, with a mask of bools, floats or lists."""
    rows = [LONG, LONG[::-1]]
    expected = tiny_model.generate(rows, max_gen_len=3, seeds=1).tokens
    given = make(rows)
    for mask in (
        [None]
        if isinstance(given, (list, tuple))
        else [torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 7), [[1] * 7] * 2]
    ):
        out = tiny_model.generate(given, attention_mask=mask, max_gen_len=3, seeds=1, return_dict_in_generate=True)
        assert out.tokens == expected


def test_input_ids_and_batch_encodings(tiny_model, tiny_tokenizer):
    """`generate(**tokenizer(text))`, transformers' own way."""
    encoded = tiny_tokenizer(["To be, or not to be"], return_tensors="pt")
    out = tiny_model.generate(**encoded, max_gen_len=5, seeds=2)
    assert torch.equal(out, tiny_model.generate(encoded.input_ids, max_gen_len=5, seeds=2))
    with pytest.raises(ValueError, match="input_ids means inputs"):
        tiny_model.generate(encoded.input_ids, input_ids=encoded.input_ids + 1, max_gen_len=5)


def test_pad_and_eos_ids_inside_prompts_are_tokens(tiny_model):
    """A LLAMA2 chat prompt holds EOS between its turns: it stops nothing, and echo returns it."""
    prompts = [[BOS, 5, EOS, BOS, 6], [BOS, EOS, EOS], [0, 0, 0, 0, 0, 0]]
    for schedule in ("reference", "padded"):
        out = tiny_model.generate(prompts, max_gen_len=5, seeds=4, echo=True, schedule=schedule)
        for row, prompt in zip(out.tokens, prompts, strict=True):
            assert row[: len(prompt)] == prompt
            assert len(row) > len(prompt)


@pytest.mark.parametrize("pad", [-1, 5000])
def test_a_pad_id_is_a_mark(tiny_model, pad):
    """Old LLaMA checkpoints name pad -1, as Meta does: it is never embedded, and marks what is not text."""
    model = copy.copy(tiny_model)
    model.generation_config = GenerationConfig(eos_token_id=[EOS, OFTEN], pad_token_id=pad)
    expected = tiny_model.generate(RAGGED, max_gen_len=8, seeds=6, eos_token_id=[EOS, OFTEN], pad_token_id=0)
    for schedule in ("reference", "padded"):
        out = model.generate(RAGGED, max_gen_len=8, seeds=6, schedule=schedule)
        assert out.tokens == expected.tokens
    assert out.sequences[0, :4].tolist() == [pad] * 4


# --- settings -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_contributes_no_sampling_settings(tiny_model, tmp_path):
    """generation_config.json says temperature .1, top_p .1, top_k 5, do_sample true: nothing changes."""
    tiny_model.save_pretrained(tmp_path)
    GenerationConfig(
        temperature=0.1, top_p=0.1, top_k=5, do_sample=True, repetition_penalty=3.0, eos_token_id=EOS, max_new_tokens=2
    ).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert model.generation_config.top_k == 5
    for stream in ({"seeds": 1}, {}):
        torch.manual_seed(3)
        ours = model.generate(RAGGED, max_gen_len=12, logprobs=True, **stream)
        torch.manual_seed(3)
        plain = tiny_model.generate(RAGGED, max_gen_len=12, logprobs=True, **stream)
        assert ours.tokens == plain.tokens
        assert ours.logprobs == plain.logprobs
        assert (ours.settings["temperature"], ours.settings["top_p"]) == (0.6, 0.9)
    assert model.generation_config.top_k == 5
    assert model.generation_config.temperature == 0.1


def test_settings_are_metas_defaults(tiny_model):
    """temperature .6, top_p .9, and what else was in force."""
    out = tiny_model.generate(RAGGED, max_gen_len=4, seeds=9)
    assert out.settings == {
        "temperature": 0.6,
        "top_p": 0.9,
        "max_gen_len": 4,
        "max_seq_len": 512,
        "seeds": [9, 10, 11],
        "num_return_sequences": 1,
        "schedule": "padded",
        "compat": "fixed",
        "echo": False,
        "eos_token_id": [EOS],
        "pad_token_id": EOS,
    }


def test_a_generation_config_in_the_call_counts(tiny_model):
    """Its settings are in force, the call's own words go before it, and it is left as it was."""
    config = GenerationConfig(temperature=1.0, top_p=0.3, max_new_tokens=3, eos_token_id=[EOS, OFTEN], pad_token_id=0)
    before = config.to_dict()
    out = tiny_model.generate(RAGGED, config, seeds=1)
    asked = {"temperature": 1.0, "top_p": 0.3, "max_gen_len": 3, "eos_token_id": [EOS, OFTEN], "seeds": 1}
    assert out.tokens == tiny_model.generate(RAGGED, **asked).tokens
    assert {name: out.settings[name] for name in ("temperature", "top_p", "max_gen_len")} == {
        "temperature": 1.0,
        "top_p": 0.3,
        "max_gen_len": 3,
    }
    out = tiny_model.generate(RAGGED, generation_config=config, top_p=0.5, max_new_tokens=2, seeds=1)
    assert (out.settings["top_p"], out.settings["max_gen_len"]) == (0.5, 2)
    assert config.to_dict() == before
    assert tiny_model.generate([SHORT], GenerationConfig(do_sample=False, max_length=5)).settings["temperature"] == 0


def test_a_checkpoints_own_config_may_be_passed(tiny_model):
    """`generation_config=model.generation_config` is what pipelines do."""
    out = tiny_model.generate([SHORT], tiny_model.generation_config, max_gen_len=4, seeds=1)
    assert out.tokens == tiny_model.generate([SHORT], max_gen_len=4, seeds=1).tokens


def test_eos_lists_of_the_checkpoint_and_of_the_call(tiny_model):
    """Any of them stops a row; the call's go before the checkpoint's; an empty list stops nothing."""
    model = copy.copy(tiny_model)
    model.generation_config = GenerationConfig(eos_token_id=[EOS, OFTEN])
    free = model.generate([SHORT] * 6, max_gen_len=40, seeds=0, eos_token_id=[])
    assert all(len(row) == 40 for row in free.tokens)
    assert set(free.finish_reason) == {"length"}
    stopped = model.generate([SHORT] * 6, max_gen_len=40, seeds=0)
    for row, whole, why in zip(stopped.tokens, free.tokens, stopped.finish_reason, strict=True):
        end = next((i for i, token in enumerate(whole) if token in (EOS, OFTEN)), 40)
        assert row == whole[:end]
        assert why == ("stop" if end < 40 else "length")
    assert "stop" in stopped.finish_reason
    other = free.tokens[0][3]
    for given in (other, [other], (other,), torch.tensor([other]), np.int64(other)):
        row = model.generate([SHORT], max_gen_len=40, seeds=0, eos_token_id=given).tokens[0]
        assert row == free.tokens[0][: free.tokens[0].index(other)]


def test_aliases(tiny_model):
    """max_new_tokens means max_gen_len, max_length means max_seq_len, do_sample=False means temperature 0."""
    expected = tiny_model.generate(RAGGED, max_gen_len=5, max_seq_len=9, seeds=1).tokens
    assert tiny_model.generate(RAGGED, max_new_tokens=5, max_length=9, seeds=1).tokens == expected
    assert tiny_model.generate(RAGGED, max_gen_len=5, max_new_tokens=5, max_length=9, seeds=1).tokens == expected
    by_length = tiny_model.generate(RAGGED, max_length=9, seeds=1, eos_token_id=[])
    assert [len(row) for row in by_length.tokens] == [9 - len(prompt) for prompt in RAGGED]
    greedy = tiny_model.generate(RAGGED, max_gen_len=5, temperature=0).tokens
    assert tiny_model.generate(RAGGED, max_gen_len=5, do_sample=False).tokens == greedy
    assert tiny_model.generate(RAGGED, max_gen_len=5, do_sample=False, temperature=[0, 0.0, 0]).tokens == greedy
    assert tiny_model.generate(RAGGED, max_gen_len=torch.tensor([5, 5, 5]), do_sample=False).tokens == greedy
    assert tiny_model.generate(RAGGED, max_gen_len=[5] * 3, max_new_tokens=[5] * 3, do_sample=False).tokens == greedy


def public_options():
    """Every option of transformers' generation config that has no place here, with a value that asks for something."""
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - HANDED_ON - READ_HERE
    values = {
        "num_beams": 4,
        "top_k": 5,
        "min_p": 0.1,
        "typical_p": 0.5,
        "renormalize_logits": 3,
        "output_scores": True,
    }
    return [(name, values.get(name, 2)) for name in sorted(names)]


REFUSED = [
    *public_options(),
    ("assistant_model", object()),
    ("assistant_tokenizer", object()),
    ("custom_generate", "x"),
    ("negative_prompt_ids", torch.ones(1, 2).long()),
    ("negative_prompt_attention_mask", torch.ones(1, 2)),
    ("inputs_embeds", torch.ones(1, 2, 192)),
    ("position_ids", torch.ones(1, 3).long()),
    ("labels", torch.ones(1, 3).long()),
    ("cache_implementation", "paged"),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[name for name, _ in REFUSED])
def test_options_without_a_place_are_refused_by_name(tiny_model, name, value):
    """None is silently ignored; the message names the option and a way out, and nothing is drawn."""
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=name):
        tiny_model.generate([SHORT], max_gen_len=2, **{name: value})
    if name not in ("cache_implementation",) and name in vars(GenerationConfig()):
        config = GenerationConfig()
        setattr(config, name, value)
        with pytest.raises(ValueError, match=name):
            tiny_model.generate([SHORT], config, max_gen_len=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_options_that_ask_for_nothing_are_taken(tiny_model):
    """Neutral values, None and False are no request."""
    neutral = {"top_k": 0, "typical_p": 1.0, "min_p": 0.0, "num_beams": 1, "early_stopping": False, "min_length": None}
    out = tiny_model.generate([SHORT], max_gen_len=4, seeds=1, assistant_model=None, **neutral)
    assert out.tokens == tiny_model.generate([SHORT], max_gen_len=4, seeds=1).tokens


def test_the_ways_out_of_the_refusals_work(tiny_model):
    """`TopKLogitsWarper` and the others in logits_processor edit before the draw."""
    for warper in (
        transformers.TopKLogitsWarper(1),
        transformers.MinPLogitsWarper(1.0),
        transformers.EpsilonLogitsWarper(0.9),
    ):
        out = tiny_model.generate(RAGGED, max_gen_len=5, seeds=1, logits_processor=[warper])
        assert out.tokens == tiny_model.generate(RAGGED, max_gen_len=5, temperature=0).tokens


# --- what comes back ------------------------------------------------------------------------------------------------


def test_return_types(tiny_model):
    """A tensor for tensors; the output for lists, or where more than ids was asked for."""
    ids = torch.tensor([SHORT])
    assert type(tiny_model.generate(ids, max_gen_len=3)) is torch.Tensor
    for asked in ({"echo": True}, {"logprobs": True}, {"top_logprobs": 1}, {"return_dict_in_generate": True}):
        assert type(tiny_model.generate(ids, max_gen_len=3, **asked)) is LlamaGenerateOutput
    out = tiny_model.generate([SHORT], max_gen_len=3)
    assert isinstance(out, ModelOutput)
    assert out.logprobs is None
    assert out.top_logprobs is None
    assert out.sampled_logprobs is None
    # On a copy: transformers leaves hooks on a model that was asked for its hidden states, and those cannot be pickled.
    model = copy.deepcopy(tiny_model)
    with_all = model.generate(ids, max_gen_len=3, output_logits=True, output_hidden_states=True, logprobs=True)
    assert len(with_all.logits) == len(with_all.hidden_states) == 3


@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_sequences_keep_transformers_convention(tiny_model, schedule):
    """Left-padded prompt, completion with its EOS, then pad; `tokens` are the same without prompt, EOS and pad."""
    asked = {"max_gen_len": 30, "seeds": 5, "schedule": schedule, "eos_token_id": [EOS, OFTEN], "pad_token_id": 7}
    out = tiny_model.generate(RAGGED, **asked)
    longest = max(map(len, RAGGED))
    assert "stop" in out.finish_reason
    for row, prompt, tokens, why in zip(out.sequences.tolist(), RAGGED, out.tokens, out.finish_reason, strict=True):
        gap = longest - len(prompt)
        assert row[:gap] == [7] * gap
        assert row[gap:longest] == prompt
        rest = row[longest:]
        assert rest[: len(tokens)] == tokens
        if why == "stop":
            assert rest[len(tokens)] in (EOS, OFTEN)
            assert set(rest[len(tokens) + 1 :]) <= {7}
        else:
            assert len(tokens) == 30
    assert torch.equal(tiny_model.generate(**padded(RAGGED, "right"), **asked), out.sequences)


def test_finish_reasons_do_not_count_what_lies_beyond_the_limit(tiny_model):
    """In the reference schedule a row goes on beyond its limit, as in the reference; an EOS there is not its own."""
    prompts = [SHORT, SHORT + [9] * 40]
    for seed in range(4):
        dense, pad = (
            tiny_model.generate(prompts, max_gen_len=3, seeds=seed, schedule=schedule, eos_token_id=[EOS, OFTEN])
            for schedule in ("reference", "padded")
        )
        assert dense.tokens == pad.tokens
        assert dense.finish_reason == pad.finish_reason
        assert torch.equal(dense.sequences, pad.sequences)


@pytest.mark.parametrize("asked", [{}, {"seeds": 1}, {"temperature": 0}])
@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_criteria_beyond_a_rows_limit_end_nothing_of_it(tiny_model, asked, schedule):
    """A row that ran into its limit says so, also where a criterion is met later or nothing was to be made."""
    late = [lambda ids, scores, **_: torch.full((len(ids),), ids.shape[1] >= 12)]
    limits = {"max_gen_len": [2, 20], "eos_token_id": [], "schedule": schedule}
    out = tiny_model.generate([[1, 5, 6], [1, 5, 6, 7, 8, 9]], stopping_criteria=late, **limits, **asked)
    assert out.finish_reason == ["length", "stop"]
    always = [lambda ids, scores, **_: torch.ones(len(ids), dtype=torch.bool)]
    limits["max_gen_len"] = [0, 3]
    out = tiny_model.generate([[1, 5, 6], [1, 5, 6]], stopping_criteria=always, **limits, **asked)
    assert out.finish_reason == ["length", "stop"] and [len(row) for row in out.tokens] == [0, 1]


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


def test_nothing_to_generate(tiny_model):
    """max_gen_len 0: an empty answer, or with echo the prompt and its scores, alike in both schedules."""
    for schedule in ("reference", "padded"):
        out = tiny_model.generate(RAGGED, max_gen_len=0, schedule=schedule)
        assert out.tokens == [[], [], []]
        assert out.finish_reason == ["length"] * 3
        out = tiny_model.generate(RAGGED, max_gen_len=0, schedule=schedule, echo=True, logprobs=True, top_logprobs=2)
        assert out.tokens == RAGGED
        close(out.logprobs, tiny_model.score_tokens(RAGGED).logprobs)
        assert [[len(best) for best in row] for row in out.top_logprobs] == [[0, *[2] * (len(p) - 1)] for p in RAGGED]
    assert torch.equal(tiny_model.generate(torch.tensor([SHORT]), max_gen_len=0), torch.tensor([SHORT]))


def test_logprobs_are_of_the_raw_logits(tiny_model):
    """Prompt and completion, against one plain forward per row; temperature and nucleus do not show."""
    for schedule in ("reference", "padded"):
        for temperature in (0, 0.6, [0.0, 2.0, 0.6]):
            out = tiny_model.generate(
                RAGGED, max_gen_len=9, temperature=temperature, seeds=1, echo=True, logprobs=True, schedule=schedule
            )
            close(out.logprobs, [at(plain_logprobs(tiny_model, row), row) for row in out.tokens])
            assert all(row[0] == 0.0 for row in out.logprobs)
            without = tiny_model.generate(
                RAGGED, max_gen_len=9, temperature=temperature, seeds=1, logprobs=True, schedule=schedule
            )
            close(without.logprobs, [row[len(p) :] for row, p in zip(out.logprobs, RAGGED, strict=True)])


def test_top_logprobs(tiny_model):
    """The k best ids with their raw logprobs, best first, at every position; k up to the vocabulary."""
    for schedule in ("reference", "padded"):
        out = tiny_model.generate(RAGGED, max_gen_len=6, seeds=1, echo=True, top_logprobs=3, schedule=schedule)
        assert out.logprobs is None
        for row, best in zip(out.tokens, out.top_logprobs, strict=True):
            assert best[0] == []
            values, ids = plain_logprobs(tiny_model, row)[1:].topk(3)
            assert [[token for token, _ in place] for place in best[1:]] == ids.tolist()
            close([[value for _, value in place] for place in best[1:]], values.tolist())
    every = tiny_model.generate([SHORT], max_gen_len=1, seeds=1, top_logprobs=1024)
    assert sorted(token for token, _ in every.top_logprobs[0][0]) == list(range(1024))


def test_sampled_logprobs(tiny_model):
    """Under the renormalized nucleus after temperature, recomputed here; 0 for prompts and greedy rows."""
    temperatures, ps = [0.6, 1.5, 0.0], [0.9, 0.5, 0.9]
    out = tiny_model.generate(
        RAGGED, max_gen_len=8, temperature=temperatures, top_p=ps, seeds=1, echo=True, logprobs=True
    )
    for row, found, prompt, t, p in zip(out.tokens, out.sampled_logprobs, RAGGED, temperatures, ps, strict=True):
        assert len(found) == len(row)
        assert found[: len(prompt)] == [0.0] * len(prompt)
        if t == 0:
            assert set(found) == {0.0}
            continue
        for position in range(len(prompt), len(row)):
            probs = torch.softmax(plain_logprobs(tiny_model, row)[position].double() / t, -1)
            ordered, ids = probs.sort(descending=True)
            ordered[ordered.cumsum(-1) - ordered > p] = 0
            ordered /= ordered.sum()
            expected = float(ordered[ids == row[position]].log())
            assert found[position] == pytest.approx(expected, abs=1e-4)


# --- Meta's stream --------------------------------------------------------------------------------------------------


def random_case(draw, vocab, *, most_rows=6, longest=12, most_new=8):
    """A ragged batch and settings for it."""
    rows = draw.randint(1, most_rows)
    prompts = [[draw.randrange(vocab) for _ in range(draw.randint(1, longest))] for _ in range(rows)]
    length = max(map(len, prompts))
    settings = {
        "max_gen_len": draw.randint(0, most_new),
        "max_seq_len": draw.choice([512, 512, length + draw.randint(0, most_new)]),
        "temperature": draw.choice([0.0, 0.3, 0.6, 1.0, 1.0, 1.7]),
        "top_p": draw.choice([0.0, 0.5, 0.9, 0.9, 0.99, 1.0]),
        "echo": draw.random() < 0.5,
        "logprobs": draw.random() < 0.5,
    }
    return prompts, settings, draw.choice([[EOS], [EOS, OFTEN], list(range(0, vocab, 7))])


def blocks_drawn(seed, shape, state, most):
    """How many (B, V) draws lead from the seed to a state."""
    generator = torch.Generator().manual_seed(seed)
    for count in range(most + 1):
        if torch.equal(generator.get_state(), state):
            return count
        torch.empty(shape).exponential_(generator=generator)
    raise AssertionError("the state is none of the reference's")


def check_against_the_reference(model, prompts, settings, eos, seed):
    """Dense and padded give the reference's answer; the generator ends where the docstring says."""
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(seed)
    tokens, logprobs = reference_generate(model, prompts, eos_ids=eos, generator=generator, **settings)
    for schedule in ("reference", "padded"):
        ours = torch.Generator().manual_seed(seed)
        out = model.generate(prompts, generator=ours, eos_token_id=eos, compat="meta", schedule=schedule, **settings)
        assert out.tokens == tokens, schedule
        if settings["logprobs"]:
            close(out.logprobs, logprobs)
        if not torch.equal(ours.get_state(), generator.get_state()):
            # Allowed in padded alone, where the reference met an EOS beyond the limit of a row that ran into it.
            assert schedule == "padded"
            lengths = [len(prompt) for prompt in prompts]
            steps = min(settings["max_seq_len"], max(lengths) + settings["max_gen_len"]) - min(lengths)
            assert blocks_drawn(seed, (len(prompts), vocab), generator.get_state(), steps) < steps
            assert blocks_drawn(seed, (len(prompts), vocab), ours.get_state(), steps) == steps
            assert "length" in out.finish_reason


@pytest.mark.parametrize("part", range(10))
def test_random_ragged_batches_equal_the_reference(tiny_model, part):
    """200 in all, on Meta's stream: equal tokens in both schedules, logprobs within 1e-4, the generator's state."""
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


# --- one stream per prompt ------------------------------------------------------------------------------------------


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


# --- per row --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_settings_per_row_equal_rows_alone(tiny_model, schedule):
    """Temperature, top_p and max_gen_len per row, greedy and sampled rows in one batch."""
    prompts = [*RAGGED, LONG[:4]]
    temperatures, ps, lens = [0.6, 0, 1.3, 1e-45], [0.9, 0.1, 0.99, 1], [4, 9, 0, 7]
    out = tiny_model.generate(
        prompts,
        temperature=temperatures,
        top_p=ps,
        max_gen_len=lens,
        seeds=1,
        schedule=schedule,
        eos_token_id=[],
        logprobs=True,
    )
    assert [len(row) for row in out.tokens] == lens
    for row in range(4):
        alone = tiny_model.generate(
            [prompts[row]],
            temperature=temperatures[row],
            top_p=ps[row],
            max_gen_len=lens[row],
            seeds=1 + row,
            eos_token_id=[],
            logprobs=True,
        )
        assert alone.tokens[0] == out.tokens[row]
        close(alone.logprobs, out.logprobs[row : row + 1])
        close(alone.sampled_logprobs, out.sampled_logprobs[row : row + 1])
    assert out.settings["max_gen_len"] == lens


def test_settings_per_row_on_metas_stream(tiny_model):
    """Both schedules agree, and rows that share settings with a uniform call agree with it."""
    asked = {"temperature": [0.6, 0, 0.6], "top_p": [0.9, 0.9, 0.9], "max_gen_len": [7, 7, 3]}
    runs = []
    for schedule in ("reference", "padded"):
        torch.manual_seed(2)
        runs.append(tiny_model.generate(RAGGED, schedule=schedule, eos_token_id=[], **asked).tokens)
    assert runs[0] == runs[1]
    torch.manual_seed(2)
    uniform = tiny_model.generate(RAGGED, max_gen_len=7, eos_token_id=[]).tokens
    assert runs[0][0] == uniform[0]
    assert runs[0][2] == uniform[2][:3]
    assert runs[0][1] == tiny_model.generate([LONG], max_gen_len=7, temperature=0, eos_token_id=[]).tokens[0]


@pytest.mark.parametrize("schedule", ["reference", "padded", "auto"])
def test_max_seq_len_binds_each_row(tiny_model, schedule):
    """A row ends at the total length, a shorter one may go on to its own max_gen_len: Meta's limit is per row."""
    asked = {"max_gen_len": 5, "max_seq_len": 9, "seeds": 2, "eos_token_id": [], "schedule": schedule}
    out = tiny_model.generate(RAGGED, **asked)
    assert [len(row) for row in out.tokens] == [5, 2, 5]
    assert out.finish_reason == ["length"] * 3
    for row in range(3):
        alone = tiny_model.generate([RAGGED[row]], max_gen_len=5, max_seq_len=9, seeds=2 + row, eos_token_id=[])
        assert alone.tokens[0] == out.tokens[row]
    full = tiny_model.generate(RAGGED, max_gen_len=5, max_seq_len=7, seeds=2, eos_token_id=[], schedule=schedule)
    assert [len(row) for row in full.tokens] == [4, 0, 5]


def test_the_models_context_binds(tiny_model):
    """Without max_seq_len it is the limit; auto leaves padded where a padded batch would outgrow it."""
    long = [[BOS] * 508, SHORT]
    out = tiny_model.generate(long, max_gen_len=8, seeds=1, eos_token_id=[])
    assert [len(row) for row in out.tokens] == [4, 8]
    assert out.settings["schedule"] == "reference"
    assert out.tokens[1] == tiny_model.generate([SHORT], max_gen_len=8, seeds=2, eos_token_id=[]).tokens[0]
    with pytest.raises(ValueError, match=r"padded.*context of 512"):
        tiny_model.generate(long, max_gen_len=8, schedule="padded")


# --- what transformers brings ---------------------------------------------------------------------------------------


class Collect:
    """A streamer for any batch."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value)

    def end(self):
        self.ended = True


def test_a_streamer_receives_the_tokens(tiny_model, tiny_tokenizer):
    """One row: the prompt, then a token at a time; a text streamer gives the text."""
    streamer = Collect()
    out = tiny_model.generate([SHORT], max_gen_len=6, seeds=1, streamer=streamer, eos_token_id=[])
    assert streamer.ended
    assert streamer.parts[0].tolist() == [SHORT]
    assert [int(part) for part in streamer.parts[1:]] == out.tokens[0]
    texts = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True)
    tiny_model.generate([SHORT], max_gen_len=6, seeds=1, streamer=texts, eos_token_id=[])
    assert "".join(texts) == tiny_tokenizer.decode(out.tokens[0])


@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_a_streamer_of_a_batch(tiny_model, schedule):
    """One column at a time, for all rows; transformers' text streamer itself refuses more than one."""
    streamer = Collect()
    out = tiny_model.generate(
        [SHORT, SHORT[::-1]], max_gen_len=5, seeds=1, streamer=streamer, schedule=schedule, eos_token_id=[]
    )
    assert torch.stack(streamer.parts[1:], 1).tolist() == out.tokens
    with pytest.raises(ValueError, match="batch size 1"):
        tiny_model.generate([SHORT] * 2, max_gen_len=2, streamer=TextStreamer(None))
    nothing = Collect()
    tiny_model.generate(RAGGED, max_gen_len=0, streamer=nothing, schedule="padded")
    assert nothing.ended


@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_a_streamer_sees_pad_after_a_rows_end(tiny_model, schedule):
    """As in transformers: what a finished row goes on with is pad, not text."""
    asked = {"max_gen_len": 12, "seeds": 3, "schedule": schedule}
    free = tiny_model.generate([SHORT, SHORT], eos_token_id=[], **asked).tokens
    stop = next(token for token in free[0] if token not in free[1])
    streamer = Collect()
    tiny_model.generate([SHORT, SHORT], eos_token_id=[stop], pad_token_id=0, streamer=streamer, **asked)
    end = free[0].index(stop) + 1
    streamed = torch.stack(streamer.parts[1:], 1).tolist()
    assert streamed == [free[0][:end] + [0] * (12 - end), free[1]]


def test_repetition_penalty(tiny_model):
    """It edits the logits before the draw, and the completion's logprobs are those of the edited logits."""
    out = tiny_model.generate([SHORT], max_gen_len=12, temperature=0, repetition_penalty=1.8, logprobs=True, echo=True)
    plain = tiny_model.generate([SHORT], max_gen_len=12, temperature=0)
    assert out.tokens[0][3:] != plain.tokens[0]
    row = out.tokens[0]
    with torch.no_grad():
        logits = tiny_model(torch.tensor([row])).logits[0]
    for position in range(3, len(row)):
        seen = torch.tensor(sorted(set(row[:position])))
        edited = logits[position - 1].clone()
        edited[seen] = torch.where(edited[seen] > 0, edited[seen] / 1.8, edited[seen] * 1.8)
        assert row[position] == int(edited.argmax())
        assert out.logprobs[0][position] == pytest.approx(float(edited.log_softmax(-1)[row[position]]), abs=1e-4)
    close([out.logprobs[0][:3]], tiny_model.score_tokens([SHORT]).logprobs)  # the prompt's are raw


@pytest.mark.parametrize(
    "editing",
    [
        {"repetition_penalty": 1.6},
        {"encoder_repetition_penalty": 1.6},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[OFTEN], [13, 5]]},
        {"sequence_bias": [[[OFTEN], -5.0], [[5, 6], 4.0]]},
        {"suppress_tokens": [OFTEN, 13]},
        {"guidance_scale": 1.5},
        {"min_new_tokens": 5},
        {"forced_eos_token_id": EOS},
        {"logits_processor": [transformers.TopKLogitsWarper(3)]},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [5, 6, 7, EOS]},
    ],
    ids=lambda editing: next(iter(editing)),
)
def test_editing_options_do_not_let_rows_see_each_other(tiny_model, editing):
    """Same seed and prompt, ragged: with an option that edits logits, a row is what it is alone, logprobs too."""
    asked = {
        "max_gen_len": 10,
        "temperature": 1.0,
        "logprobs": True,
        "echo": True,
        "eos_token_id": [EOS, OFTEN],
        **editing,
    }
    batch = tiny_model.generate(RAGGED, seeds=1, **asked)
    for row, prompt in enumerate(RAGGED):
        alone = tiny_model.generate([prompt], seeds=1 + row, **asked)
        assert alone.tokens[0] == batch.tokens[row]
        close(alone.logprobs, batch.logprobs[row : row + 1])


@pytest.mark.parametrize(
    ("editing", "schedule", "says"),
    [
        ({"encoder_repetition_penalty": 1.6}, "reference", 'whole prompts.*schedule="padded"'),
        ({"guidance_scale": 1.5}, "reference", 'whole prompts.*schedule="padded"'),
        ({"encoder_no_repeat_ngram_size": 2}, "reference", "whole prompts.*take prompts of one length"),
        ({"encoder_no_repeat_ngram_size": 2}, "padded", "padding.*take prompts of one length"),
        ({"encoder_no_repeat_ngram_size": 2}, "auto", "whole prompts.*take prompts of one length"),
        ({"no_repeat_ngram_size": 2}, "padded", 'padding.*schedule="reference"'),
    ],
)
def test_editing_options_that_would_see_other_rows_are_refused(tiny_model, editing, schedule, says):
    """Where a ragged layout would show a processor a cut prompt or padding; prompts of one length are fine."""
    (name,) = editing
    asked = {"max_gen_len": 3, "seeds": 1, "schedule": schedule, **editing}
    with pytest.raises(ValueError, match=f"{name}.*{says}"):
        tiny_model.generate(RAGGED, **asked)
    tiny_model.generate([SHORT, SHORT], **asked)
    neutral = 0 if "ngram" in name else 1
    tiny_model.generate(RAGGED, **{**asked, name: neutral})


def test_a_processor_may_forbid_tokens(tiny_model):
    """-inf from a processor is its right; logprobs are of the edited logits, and the input is not touched."""

    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            allowed = torch.full_like(scores, -math.inf)
            allowed[:, [5, 6, 7]] = scores[:, [5, 6, 7]]
            return allowed

    for schedule in ("reference", "padded"):
        out = tiny_model.generate(
            RAGGED,
            max_gen_len=5,
            seeds=1,
            logprobs=True,
            top_logprobs=4,
            echo=True,
            logits_processor=[Only()],
            schedule=schedule,
            output_logits=True,
        )
        for row, prompt, scores, best in zip(out.tokens, RAGGED, out.logprobs, out.top_logprobs, strict=True):
            assert set(row[len(prompt) :]) <= {5, 6, 7}
            raw = plain_logprobs(tiny_model, row)[len(prompt) :, [5, 6, 7]].log_softmax(-1)
            close(
                [scores[len(prompt) :]],
                [[float(place[token - 5]) for place, token in zip(raw, row[len(prompt) :], strict=True)]],
            )
            close([scores[: len(prompt)]], [at(plain_logprobs(tiny_model, prompt), prompt)])
            assert best[-1][3][1] == -math.inf


def test_stop_strings_and_criteria(tiny_model, tiny_tokenizer):
    """A stop string ends its row with `"stop"`, a criterion of the caller's ends rows one by one."""
    free = tiny_model.generate([SHORT] * 4, max_gen_len=30, seeds=3, eos_token_id=[])
    for schedule in ("reference", "padded"):
        out = tiny_model.generate(
            [SHORT] * 4,
            max_gen_len=30,
            seeds=3,
            stop_strings=["e"],
            tokenizer=tiny_tokenizer,
            eos_token_id=[],
            schedule=schedule,
        )
        for row, whole, why in zip(out.tokens, free.tokens, out.finish_reason, strict=True):
            assert row == whole[: len(row)]
            assert why == ("stop" if len(row) < 30 else "length")
            text = tiny_tokenizer.decode(row)
            assert ("e" in text) == (why == "stop")
            assert "e" not in tiny_tokenizer.decode(row[:-1])
    assert "stop" in out.finish_reason

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 5 + row for row in range(len(input_ids))])

    out = tiny_model.generate([SHORT] * 4, max_gen_len=4, seeds=3, stopping_criteria=[After()], eos_token_id=[])
    assert out.tokens == [whole[: min(4, 2 + row)] for row, whole in enumerate(free.tokens)]
    assert out.finish_reason == ["stop"] * 3 + ["length"]


@pytest.mark.parametrize(
    "how",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"use_cache": True},
        {"prefill_chunk_size": 2},
        {"output_attentions": False},
        {"synced_gpus": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_caches(tiny_model, how, schedule):
    """Static cache, none, chunked prefill: the same tokens, and the same logprobs within float32 rounding."""
    asked = {"max_gen_len": 6, "seeds": 1, "logprobs": True, "echo": True, "schedule": schedule}
    plain = tiny_model.generate(RAGGED, **asked)
    out = tiny_model.generate(RAGGED, **asked, **how)
    assert out.tokens == plain.tokens
    close(out.logprobs, plain.logprobs)
    assert tiny_model.generate(RAGGED, max_gen_len=6, seeds=1, schedule=schedule, **how).tokens == [
        row[len(prompt) :] for row, prompt in zip(plain.tokens, RAGGED, strict=True)
    ]


def test_a_cache_goes_from_turn_to_turn(tiny_model):
    """past_key_values of one call in the next: the tokens of a call without it, logprobs of the whole text too."""
    first = tiny_model.generate(
        torch.tensor([SHORT]), max_gen_len=5, seeds=1, return_dict_in_generate=True, eos_token_id=[]
    )
    turn = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    for asked in ({}, {"echo": True, "logprobs": True}):
        fresh = tiny_model.generate(turn, max_gen_len=5, seeds=2, return_dict_in_generate=True, **asked)
        reused = tiny_model.generate(
            turn,
            max_gen_len=5,
            seeds=2,
            return_dict_in_generate=True,
            past_key_values=copy.deepcopy(first.past_key_values),
            **asked,
        )
        assert reused.tokens == fresh.tokens
        assert torch.equal(reused.sequences, fresh.sequences)
        if asked:
            close(reused.logprobs, fresh.logprobs)


def test_pipeline(tiny_model, tiny_tokenizer):
    """pipeline("text-generation") runs ours, and ignores what it does not know of the output."""
    pipe = transformers.pipeline("text-generation", model=tiny_model, tokenizer=tiny_tokenizer)
    text = "First Citizen:"
    ids = tiny_tokenizer(text).input_ids
    expected = tiny_model.generate([ids], max_gen_len=8, temperature=0.7, top_p=0.9, seeds=3).tokens[0]
    for more in ({}, {"logprobs": True, "top_logprobs": 2}):
        (answer,) = pipe(text, max_new_tokens=8, temperature=0.7, top_p=0.9, seeds=3, **more)
        assert answer["generated_text"].startswith(text)
        assert answer["generated_text"].removeprefix(text) == tiny_tokenizer.decode(
            ids + expected, skip_special_tokens=True
        ).removeprefix(text)
    greedy = pipe(text, max_new_tokens=8, do_sample=False, return_full_text=False)
    assert greedy == pipe(text, max_new_tokens=8, do_sample=False, return_full_text=False)


def test_threads_may_share_a_model(tiny_model, tiny_tokenizer):
    """Four generate at once, each into its own streamer: with seeds each gets what it gets alone."""
    prompts = [SHORT, LONG, [BOS, 40], [BOS, 300, 301]]
    alone = [tiny_model.generate([p], max_gen_len=25, seeds=row).tokens[0] for row, p in enumerate(prompts)]
    streamers = [TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, skip_special_tokens=True) for _ in prompts]
    answers = {}

    def work(row):
        answers[row] = tiny_model.generate([prompts[row]], max_gen_len=25, seeds=row, streamer=streamers[row]).tokens[0]

    threads = [threading.Thread(target=work, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    texts = ["".join(streamer) for streamer in streamers]
    for thread in threads:
        thread.join()
    assert [answers[row] for row in range(4)] == alone
    assert texts == [tiny_tokenizer.decode(row, skip_special_tokens=True) for row in alone]


def test_the_model_is_left_as_it_was(tiny_model):
    """Neither its attributes, its config, its generation config nor its mode changes."""
    before = dict(vars(tiny_model)), tiny_model.config.to_dict(), tiny_model.generation_config.to_dict()
    tiny_model.generate(RAGGED, max_gen_len=3, logprobs=True, echo=True, cache_implementation="static")
    tiny_model.score_tokens(RAGGED)
    assert dict(vars(tiny_model)) == before[0]
    assert tiny_model.config.to_dict() == before[1]
    assert tiny_model.generation_config.to_dict() == before[2]


def test_modes_copies_and_pickles(tiny_model):
    """inference_mode, train mode (no dropout here), deepcopy and pickle: the same tokens."""
    asked = {"max_gen_len": 5, "seeds": 1, "logprobs": True, "echo": True}
    expected = tiny_model.generate(RAGGED, **asked).tokens
    with torch.inference_mode():
        assert tiny_model.generate(RAGGED, **asked).tokens == expected
    with torch.enable_grad():
        out = tiny_model.generate(RAGGED, **asked)
        assert not out.sequences.requires_grad
    clone = copy.deepcopy(tiny_model)
    assert clone.train().generate(RAGGED, **asked).tokens == expected
    assert clone.training
    assert pickle.loads(pickle.dumps(clone)).generate(RAGGED, **asked).tokens == expected


def test_sixteen_bit_models_run(tiny_model):
    """bfloat16 and float16 logits are cast to float32 before any softmax: logprobs are the model's own."""
    for dtype in (torch.bfloat16, torch.float16):
        model = copy.deepcopy(tiny_model).to(dtype)
        out = model.generate([LONG], max_gen_len=5, seeds=1, logprobs=True, echo=True)
        assert out.logprobs[0][0] == 0.0
        # 8 mantissa bits; a cached step rounds otherwise than a whole forward.
        close(out.logprobs, [at(plain_logprobs(model, out.tokens[0]), out.tokens[0])], within=0.15)
        exact = model.generate([LONG], max_gen_len=0, logprobs=True, echo=True)
        close(exact.logprobs, model.score_tokens([LONG]).logprobs, within=0.1)
        assert sum(exact.logprobs[0]) == pytest.approx(sum(tiny_model.score_tokens([LONG]).logprobs[0]), abs=0.5)


def test_tiny_and_large_batches(tiny_model):
    """A vocabulary of two, one token to start from, and 64 rows."""
    config = transformers.LlamaConfig(
        vocab_size=2,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    two = LlamaForCausalLM(config).eval()
    out = two.generate(
        [[0], [0, 1, 0]], max_gen_len=5, seeds=1, logprobs=True, top_logprobs=2, echo=True, temperature=1.0
    )
    assert all(set(row) <= {0, 1} for row in out.tokens)
    many = tiny_model.generate([[BOS]] * 64, max_gen_len=3, seeds=1)
    assert many.tokens[40] == tiny_model.generate([[BOS]], max_gen_len=3, seeds=41).tokens[0]


def test_max_time_ends_a_run(tiny_model):
    """A run that is out of time gives what it has; in ragged reference prompts might be cut, so it is refused."""
    prompts = [SHORT, [BOS, *range(20, 120)]]
    asked = {"max_gen_len": 40, "seeds": 1, "max_time": 1e-9, "echo": True, "logprobs": True, "eos_token_id": []}
    out = tiny_model.generate(prompts, **asked)
    for row, scores, prompt in zip(out.tokens, out.logprobs, prompts, strict=True):
        assert row[: len(prompt)] == prompt
        assert len(scores) == len(row) == len(prompt) + 1
    with pytest.raises(ValueError, match="max_time"):
        tiny_model.generate(prompts, schedule="reference", **asked)


# --- scores ---------------------------------------------------------------------------------------------------------


def test_score_tokens_equals_a_plain_forward(tiny_model):
    """Within 1e-5, whatever the batch-mates, as lists or padded on either side, in chunks of any size."""
    draw = random.Random(3)
    texts = [[draw.randrange(1024) for _ in range(draw.choice([1, 2, 5, 30, 100]))] for _ in range(8)]
    expected = [at(plain_logprobs(tiny_model, text), text) for text in texts]
    for chunk_bytes in (1, 1 << 20, 64 << 20):
        close(tiny_model.score_tokens(texts, chunk_bytes=chunk_bytes).logprobs, expected, within=1e-5)
    for row in (0, 3, 7):
        close(tiny_model.score_tokens([texts[row]]).logprobs, [expected[row]], within=1e-5)
    for side in ("left", "right"):
        given = padded(texts, side)
        scored = tiny_model.score_tokens(given["inputs"], attention_mask=given["attention_mask"])
        close(scored.logprobs, expected, within=1e-5)
    assert scored.top_logprobs is None


def test_score_tokens_gives_the_best_tokens_too(tiny_model):
    """top_logprobs at every position but the first."""
    scored = tiny_model.score_tokens(RAGGED, top_logprobs=2, chunk_bytes=1)
    for text, best in zip(RAGGED, scored.top_logprobs, strict=True):
        values, ids = plain_logprobs(tiny_model, text)[1:].topk(2)
        assert best[0] == []
        assert [[token for token, _ in place] for place in best[1:]] == ids.tolist()
        close([[value for _, value in place] for place in best[1:]], values.tolist(), within=1e-5)


def test_score_tokens_takes_the_models_whole_context(tiny_model):
    """A text may be as long as the model allows, and no longer."""
    text = [BOS, *range(3, 514)]
    assert len(tiny_model.score_tokens([text]).logprobs[0]) == 512
    with pytest.raises(ValueError, match="the model's context of 512 tokens, but row 1 has 513"):
        tiny_model.score_tokens([text, [*text, 5]])


def test_scores_of_a_completion_are_its_logprobs(tiny_model):
    """generate's logprobs and score_tokens of the same text agree."""
    out = tiny_model.generate(RAGGED, max_gen_len=8, seeds=1, logprobs=True, echo=True)
    close(tiny_model.score_tokens(out.tokens).logprobs, out.logprobs, within=1e-5)


# --- other models ---------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "max_position_embeddings": 48}
GROUPED = {**SMALL, **LAYERS, "num_key_value_heads": 1, "intermediate_size": 32}
OTHERS = {
    "gpt2": lambda: transformers.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=2, n_positions=48),
    "opt": lambda: transformers.OPTConfig(**SMALL, **LAYERS, ffn_dim=32, word_embed_proj_dim=32),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=16, sliding_window=4),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, **LAYERS, intermediate_size=32),
    "bloom": lambda: transformers.BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=2),
}


@pytest.fixture(params=OTHERS)
def other(request):
    """A tiny random model of another family, its weights large enough that tokens differ."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(OTHERS[request.param]()).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return model


def test_with_llama_generation_takes_any_causal_model(other, tmp_path):
    """Learned positions too: reference, padded, alone and the plain loop agree; weights are shared, the class not."""
    kind, attributes = type(other), set(vars(type(other)))
    ours = with_ours(other)
    assert isinstance(ours, (kind, LlamaGenerationMixin))
    assert type(other) is kind
    assert not isinstance(other, LlamaGenerationMixin)
    assert set(vars(kind)) == attributes
    assert all(a is b for a, b in zip(ours.parameters(), other.parameters(), strict=True))
    assert with_ours(ours) is ours
    assert type(with_ours(other)) is type(ours)

    prompts = [[1, 5, 6], [1, 7, 8, 9, 10, 11, 12, 13], [1, 9]]
    asked = {"max_gen_len": 6, "logprobs": True, "echo": True}
    dense = ours.generate(prompts, seeds=1, schedule="reference", **asked)
    for how in (
        {"schedule": "padded"},
        {"schedule": "padded", "chunk_bytes": 1},
        {"schedule": "reference", "chunk_bytes": 1},
    ):
        again = ours.generate(prompts, seeds=1, **how, **asked)
        assert again.tokens == dense.tokens
        close(again.logprobs, dense.logprobs)
    for row, prompt in enumerate(prompts):
        assert ours.generate([prompt], seeds=1 + row, **asked).tokens[0] == dense.tokens[row]
    close(ours.score_tokens(dense.tokens).logprobs, dense.logprobs)
    close(dense.logprobs, [at(plain_logprobs(other, row), row) for row in dense.tokens])
    check_against_the_reference(ours, prompts, {**asked, "max_seq_len": 40}, [2], 5)

    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is kind
    assert with_ours(loaded).generate(prompts, seeds=1, **asked).tokens == dense.tokens
    assert copy.deepcopy(ours).generate(prompts, seeds=1, **asked).tokens == dense.tokens
    assert pickle.loads(pickle.dumps(ours)).generate(prompts, seeds=1, **asked).tokens == dense.tokens


def test_hybrid_models_are_scored_in_one_chunk():
    """Recurrent states do not go on by chunks: what one chunk holds is right, and more is refused with the way out."""
    config = transformers.Lfm2Config(
        **GROUPED, layer_types=["conv", "full_attention"], conv_L_cache=3, block_auto_adjust_ff_dim=False
    )
    torch.manual_seed(0)
    model = with_ours(transformers.Lfm2ForCausalLM(config).eval())
    prompts = [[1], [1, 5], [1, 5, 6, 7, 8], [1, *range(9, 19)]]
    alone = [model.score_tokens([prompt]).logprobs[0] for prompt in prompts]
    out = model.generate(prompts, max_gen_len=2, echo=True, logprobs=True, seeds=1)
    close([row[: len(prompt)] for row, prompt in zip(out.logprobs, prompts, strict=True)], alone)
    with pytest.raises(ValueError, match="keys and values alone, and Lfm2ForCausalLM has none: raise chunk_bytes"):
        model.generate(prompts, max_gen_len=2, echo=True, logprobs=True, seeds=1, chunk_bytes=1)


def test_encoder_decoders_are_refused():
    """LLAMA2's loop continues its own prompt."""
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0
    )
    with pytest.raises(ValueError, match="decoder-only model, but T5ForConditionalGeneration is an encoder-decoder"):
        with_ours(transformers.T5ForConditionalGeneration(config))


def test_our_class_saves_and_loads_as_transformers_own(tiny_model, tmp_path):
    """The checkpoint names LlamaForCausalLM, which AutoModel finds."""
    tiny_model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    ours = with_ours(loaded.eval())
    assert (
        ours.generate(RAGGED, max_gen_len=4, seeds=1).tokens
        == tiny_model.generate(RAGGED, max_gen_len=4, seeds=1).tokens
    )


# --- nan and inf ----------------------------------------------------------------------------------------------------


class Plant:
    """Put a value into a model's logits: in row `row`, where the text's last token stands in column `column`."""

    def __init__(self, model, row, column, value):
        self.row, self.column, self.value, self.seen = row, column, value, 0
        self.handle = model.lm_head.register_forward_hook(self)
        self.counter = model.model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        past = kwargs.get("past_key_values")
        self.start = past.get_seq_length() if past is not None else 0
        self.end = self.start + ids.shape[1]

    def __call__(self, module, args, logits):
        first = self.end - logits.shape[1]  # generate asks for the last position's logits only
        if first <= self.column < self.end:
            logits = logits.clone()
            logits[self.row, self.column - first, 17] = self.value
        return logits

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.handle.remove()
        self.counter.remove()


STREAMS = {
    "meta": {},
    "seeds": {"seeds": 1},
    "greedy": {"temperature": 0},
    "mixed": {"temperature": [0, 0.5, 1], "seeds": 1},
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_bad_logits_in_a_step_are_named(tiny_model, value, stream, schedule):
    """Row and position, as the row counts them, whatever the layout; of a single row too."""
    # Padded, all prompts end in column 6; dense, row 2 of length 2 is at its 8th token in column 8.
    asked = {"max_gen_len": 12, "schedule": schedule, "eos_token_id": [], **STREAMS[stream]}
    column, position = (8, 9 - 5) if schedule == "padded" else (8, 9)
    with (
        Plant(tiny_model, 2, column, value),
        pytest.raises(ValueError, match=f"position {position} of row 2 hold nan or inf"),
    ):
        tiny_model.generate(RAGGED, **asked)
    if stream != "mixed":
        with Plant(tiny_model, 0, 2, value), pytest.raises(ValueError, match="position 3 of row 0 hold nan or inf"):
            tiny_model.generate([SHORT], **asked)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("chunk_bytes", [1, 64 << 20])
def test_bad_logits_in_a_prompt_are_named(tiny_model, value, chunk_bytes):
    """In the prefill of a batch in either schedule, and in score_tokens; those under padding are nobody's."""
    asked = {"max_gen_len": 2, "echo": True, "logprobs": True, "chunk_bytes": chunk_bytes, "seeds": 1}
    with Plant(tiny_model, 0, 4, value), pytest.raises(ValueError, match="position 1 of row 0 hold nan or inf"):
        tiny_model.generate(RAGGED, schedule="padded", **asked)
    with Plant(tiny_model, 0, 0, value), pytest.raises(ValueError, match="position 1 of row 0 hold nan or inf"):
        tiny_model.generate(RAGGED, schedule="reference", **asked)
    with Plant(tiny_model, 1, 3, value), pytest.raises(ValueError, match="position 4 of row 1 hold nan or inf"):
        tiny_model.score_tokens(RAGGED, chunk_bytes=chunk_bytes)
    plain = tiny_model.generate(RAGGED, schedule="padded", **asked), tiny_model.score_tokens(RAGGED)
    with Plant(tiny_model, 0, 2, value):  # column 2 of row 0 is padding: its prompt begins in column 4
        assert tiny_model.generate(RAGGED, schedule="padded", **asked).logprobs == plain[0].logprobs
    with Plant(tiny_model, 0, 4, value):  # beyond row 0's end
        close(tiny_model.score_tokens(RAGGED, chunk_bytes=chunk_bytes).logprobs, plain[1].logprobs, within=1e-5)


def test_bad_logits_of_a_row_that_is_done_are_nobodys(tiny_model):
    """After its EOS a row's logits mean nothing; another row goes on."""
    asked = {"seeds": 3, "max_gen_len": 12}
    free = tiny_model.generate([SHORT, SHORT], eos_token_id=[], **asked).tokens
    stop = next(token for token in free[0] if token not in free[1])
    plain = tiny_model.generate([SHORT, SHORT], eos_token_id=[stop], **asked)
    ended = 3 + free[0].index(stop)
    with Plant(tiny_model, 0, ended + 1, math.nan):
        assert tiny_model.generate([SHORT, SHORT], eos_token_id=[stop], **asked).tokens == plain.tokens
    with Plant(tiny_model, 1, ended + 1, math.nan), pytest.raises(ValueError, match=f"position {ended + 2} of row 1"):
        tiny_model.generate([SHORT, SHORT], eos_token_id=[stop], **asked)


@pytest.mark.parametrize("schedule", ["reference", "padded"])
@pytest.mark.parametrize("asked", [{}, {"seeds": 1}, {"temperature": 0}])
def test_bad_logits_of_a_row_with_nothing_to_generate_are_nobodys(tiny_model, asked, schedule):
    """A row with limit 0 answers nothing, whatever its logits, and its neighbour goes on."""
    with Plant(tiny_model, 0, 2, math.nan):
        out = tiny_model.generate([SHORT, SHORT], max_gen_len=[0, 3], eos_token_id=[], schedule=schedule, **asked)
    assert [len(row) for row in out.tokens] == [0, 3]


def test_a_processor_that_leaves_nothing_is_named(tiny_model):
    """-inf everywhere, or a nan, from a processor."""

    class Ruin(LogitsProcessor):
        def __init__(self, value):
            self.value = value

        def __call__(self, input_ids, scores):
            return torch.full_like(scores, self.value) if input_ids.shape[1] == 5 else scores

    for value in (-math.inf, math.nan):
        for stream in ("meta", "seeds", "greedy"):
            with pytest.raises(ValueError, match="position 5 of row 0"):
                tiny_model.generate(
                    [SHORT], max_gen_len=6, eos_token_id=[], logits_processor=[Ruin(value)], **STREAMS[stream]
                )


# --- operations per step --------------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """How often each operation is dispatched."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def computed(self):
        """Operations that do something: not views, not allocations."""
        views = {
            "view",
            "_unsafe_view",
            "slice",
            "select",
            "unsqueeze",
            "squeeze",
            "expand",
            "detach",
            "alias",
            "t",
            "transpose",
            "unbind",
        }
        return sum(count for name, count in self.counts.items() if name not in views | {"empty", "lift_fresh"})


CALLS = {
    "meta": {},
    "seeds": {"seeds": 1},
    "greedy": {"temperature": 0},
    "per row": {"temperature": [0.5, 0, 1], "top_p": [0.5, 0.9, 1], "seeds": 1},
    "per row, meta": {"temperature": [0.5, 0, 1], "max_gen_len": [99, 90, 80]},
    "logprobs": {"logprobs": True, "top_logprobs": 3, "echo": True},
}


def as_on_another_device(monkeypatch):
    """Take the path of devices other than the CPU: nothing is read on the host, and NumPy has no part in it."""

    def by_torch(tokens, key, salt):
        return noise.philox2x32(tokens, salt, key)

    monkeypatch.setattr(nucleus, "on_cpu", lambda probs: False)
    monkeypatch.setattr(noise, "_words_in_numpy", by_torch)
    monkeypatch.setattr(noise, "_a_word_makes_a_value", lambda: False)


@pytest.mark.parametrize("schedule", ["reference", "padded"])
@pytest.mark.parametrize("call", CALLS)
def test_a_step_waits_for_the_device_once(tiny_model, monkeypatch, call, schedule):
    """The loop's own question whether all rows are done, and no other, on the path of devices other than the CPU.

    With padding transformers also asks its mask in each step: then ours waits as often as its own generate does.
    """
    as_on_another_device(monkeypatch)

    def waits(steps):
        kwargs = {"max_gen_len": steps, "eos_token_id": [], "schedule": schedule, **CALLS[call]}
        if "max_gen_len" in CALLS[call]:
            kwargs["max_gen_len"] = [steps - 2, steps, steps - 1]
        with Waits() as counted:
            tiny_model.generate(RAGGED, **kwargs)
        return len(counted.waits)

    def waits_of_transformers(steps):
        given = padded(RAGGED, "left")
        greedy = {"do_sample": False, "max_new_tokens": steps, "eos_token_id": None, "pad_token_id": 0}
        with Waits() as counted:
            super(LlamaGenerationMixin, tiny_model).generate(**given, **greedy)
        return len(counted.waits)

    most = 10 if schedule == "reference" else waits_of_transformers(24) - waits_of_transformers(14)
    assert waits(24) - waits(14) <= most


@pytest.mark.parametrize(
    "sampler",
    [
        lambda: LlamaSampler(),
        lambda: LlamaSampler(seeds=1),
        lambda: LlamaSampler(0),
        lambda: LlamaSampler([0.5, 0, 1], [0.5, 0.9, 1], seeds=1),
    ],
)
def test_the_sampler_alone_never_waits(monkeypatch, sampler):
    """No operation of a draw reads a tensor on the host, on the path of other devices."""
    as_on_another_device(monkeypatch)
    draw, ids = sampler(), torch.ones(3, 9).long()
    draw(ids, torch.randn(3, 2000))  # the first one sets up the streams
    for width in (3.0, 0.3):  # peaked and flat
        logits = torch.randn(3, 2000) * width
        with Waits() as counted:
            draw(ids, logits)
        assert counted.waits == []


# What a step of ours adds to the model's and the loop's work, as measured, and a few to spare: on CPU, where some of it
# is NumPy's, and elsewhere, where ten rounds of Philox are 60 of them.
MOST = {
    "greedy": (20, 20),
    "meta": (72, 50),
    "seeds": (58, 105),
    "per row": (96, 115),
    "per row, meta": (120, 60),
    "logprobs": (78, 56),
}


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("call", MOST)
def test_a_step_is_a_bounded_number_of_operations(tiny_model, monkeypatch, call, elsewhere):
    """Counted by dispatch mode over the processor that draws: the median step of a run."""
    if elsewhere:
        as_on_another_device(monkeypatch)
    counts = []
    original = Step.__call__

    def counted(self, input_ids, scores):
        with Count() as count:
            result = original(self, input_ids, scores)
        counts.append(count.computed)
        return result

    monkeypatch.setattr(Step, "__call__", counted)
    kwargs = {"eos_token_id": [], "schedule": "padded", **CALLS[call], "max_gen_len": 13}
    tiny_model.generate(RAGGED, **kwargs)
    assert sorted(counts)[6] <= MOST[call][elsewhere], sorted(counts)


def test_no_warning_is_given(tiny_model):
    """Neither transformers nor we warn in an ordinary call (pytest makes warnings errors; this one looks at all)."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        tiny_model.generate(RAGGED, max_gen_len=3, logprobs=True, echo=True, seeds=1)
    assert found == []
