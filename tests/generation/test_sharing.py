"""Rows that share a prefill answer as they do without: tokens equal, logprobs within float32 rounding."""

import copy

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_llama_sampling import with_llama_generation
from tests.bounds import ROUNDING
from tests.conftest import examples
from tests.generation.helpers import STREAMS, close
from tests.generation.test_prefix import Forwards

pytestmark = pytest.mark.slow

HEADER = [1, *range(40, 100)]
PROMPTS = {
    "equal": [HEADER, HEADER, HEADER],
    "even": [[*HEADER, 5, 6], [*HEADER, 7, 8], [*HEADER, 5, 6]],
    "ragged": [[*HEADER, 5], [*HEADER, *range(300, 320)], HEADER[:30]],
}
KINDS = pytest.mark.parametrize("kind", PROMPTS)


def both(model, prompts, **asked):
    """The answers without and with sharing, from one state of the global generator, and their forwards."""
    answers, forwarded = [], []
    model.generate(prompts, share_prefix=True, max_gen_len=1)  # the trials of a first call are over
    for share in (False, True):
        torch.manual_seed(5)
        with Forwards(model) as forwards:
            answers.append(model.generate(prompts, share_prefix=share, **asked))
        forwarded.append(forwards)
    return answers, forwarded


def same_answers(plain, shared):
    """Equal tokens, finish reasons and settings; logprobs and best tokens within rounding."""
    assert shared.tokens == plain.tokens
    assert shared.finish_reason == plain.finish_reason
    assert shared.sequences.tolist() == plain.sequences.tolist()
    assert shared.settings == plain.settings
    for name in ("logprobs", "sampled_logprobs"):
        if getattr(plain, name) is not None:
            close(getattr(shared, name), getattr(plain, name))
    if plain.top_logprobs is not None:
        for mine, theirs in zip(shared.top_logprobs, plain.top_logprobs, strict=True):
            close([[value for _, value in best] for best in mine], [[value for _, value in best] for best in theirs])


@KINDS
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("more", [{}, {"echo": True, "logprobs": True, "top_logprobs": 2}], ids=["tokens", "echo"])
def test_sharing_changes_no_answer(tiny_model, kind, stream, more):
    """On both random-number contracts, greedy and mixed; with everything echoed and without."""
    (plain, shared), forwards = both(tiny_model, PROMPTS[kind], max_gen_len=6, **STREAMS[stream], **more)
    same_answers(plain, shared)
    assert forwards[1].tokens < forwards[0].tokens - 50


@KINDS
@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": [0.0, 0.5, 1.2], "top_p": [0.5, 0.9, 1.0], "max_gen_len": [2, 5, 0]},
        {"max_gen_len": 9, "max_seq_len": 84},
        {"max_gen_len": 4, "chunk_bytes": 1 << 16, "echo": True, "logprobs": True},
        {"max_gen_len": 4, "num_return_sequences": 3, "logprobs": True},
        {"max_gen_len": 6, "eos_token_id": list(range(0, 1024, 3)), "logprobs": True},
        {"max_gen_len": 6, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "logprobs": True, "echo": True},
        {"max_gen_len": 3, "schedule": "reference", "echo": True, "logprobs": True},
        {"max_gen_len": 3, "schedule": "padded", "compat": "meta"},
        {"max_gen_len": 0, "echo": True, "logprobs": True},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_every_setting_means_what_it_means_without(tiny_model, kind, asked):
    """Per-row settings, limits, chunks, copies, EOS, edits and both schedules."""
    (plain, shared), _ = both(tiny_model, PROMPTS[kind], seeds=3, **asked)
    same_answers(plain, shared)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, **examples(40))
@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(3, 5), max_size=5)), min_size=1, max_size=6),
    copies=st.integers(1, 3),
    echo=st.booleans(),
    stream=st.sampled_from(list(STREAMS)[:3]),
)
def test_any_batch_answers_as_without_sharing(tiny_model, rows, copies, echo, stream):
    """Random batches whose prompts share beginnings, or all of a prompt, with copies."""
    prompts = [[1, *range(50, 50 + common), *ids] for common, ids in rows]
    asked = {"max_gen_len": 4, "num_return_sequences": copies, "echo": echo, "logprobs": True}
    (plain, shared), _ = both(tiny_model, prompts, **asked, **STREAMS[stream])
    same_answers(plain, shared)


def test_the_copies_of_a_prompt_are_prefilled_once(tiny_model):
    """8 samples of 61 tokens: one row of 60 columns, then the last column and 4 of 5 new tokens for each row."""
    asked = {"max_gen_len": 5, "num_return_sequences": 8, "seeds": 1, "eos_token_id": []}
    tiny_model.generate([HEADER], **asked)  # the trial of a first call is over
    with Forwards(tiny_model) as forwards:
        tiny_model.generate([HEADER], **asked)
    assert forwards.shapes == [(1, 60)] + 5 * [(8, 1)]


def test_a_common_beginning_is_prefilled_once(tiny_model):
    """Two rows of 62 and 81 tokens with 61 in common: 60 columns of one row, 21 of both, 2 of 3 new tokens."""
    prompts = PROMPTS["ragged"][:2]
    asked = {"max_gen_len": 3, "seeds": 1, "eos_token_id": [], "share_prefix": True}
    tiny_model.generate(prompts, **asked)
    with Forwards(tiny_model) as forwards:
        tiny_model.generate(prompts, **asked)
    assert forwards.shapes == [(1, 60), (2, 21), (2, 1), (2, 1)]


def test_echo_costs_no_forward_more(tiny_model):
    """With logprobs of everything, the shapes of all forwards are those of a plain call, shared or not."""
    for prompts in ([HEADER], PROMPTS["ragged"]):
        for share in (False, True):
            asked = {"max_gen_len": 3, "seeds": 1, "eos_token_id": [], "share_prefix": share}
            tiny_model.generate(prompts, **asked, logprobs=True, echo=True)
            with Forwards(tiny_model) as plain:
                tiny_model.generate(prompts, **asked)
            with Forwards(tiny_model) as scored:
                tiny_model.generate(prompts, **asked, logprobs=True, echo=True)
            assert scored.shapes == plain.shapes


def test_sharing_is_on_where_it_pays(tiny_model):
    """By default, unless the saving is small, the reference schedule was asked for by name, or it is switched off."""
    first = {"max_gen_len": 1, "seeds": 1}

    def prefilled(prompts, **asked):
        tiny_model.generate(prompts, **first, **asked)
        with Forwards(tiny_model) as forwards:
            tiny_model.generate(prompts, **first, **asked)
        return forwards.shapes

    assert prefilled([HEADER], num_return_sequences=4) == [(1, 60), (4, 1)]
    assert prefilled([HEADER], num_return_sequences=4, share_prefix=False) == [(4, 61)]
    assert prefilled([HEADER], num_return_sequences=4, schedule="reference") == [(4, 61)]
    assert prefilled([HEADER[:4]], num_return_sequences=4) == [(4, 4)]
    assert prefilled([HEADER[:4]], num_return_sequences=4, share_prefix=True) == [(1, 3), (4, 1)]


@pytest.mark.parametrize("more", ["output_attentions", "output_hidden_states"])
def test_extra_outputs_are_whole(tiny_model, more):
    """A caller who keeps attentions or hidden states gets those of all columns: nothing is shared then."""
    model = copy.deepcopy(tiny_model)  # transformers leaves hooks on it
    model.set_attn_implementation("eager")
    asked = {"max_gen_len": 2, "seeds": 1, "return_dict_in_generate": True, more: True}
    (plain, shared), forwards = both(model, PROMPTS["equal"], **asked)
    assert forwards[0].shapes == forwards[1].shapes
    name = more.removeprefix("output_")
    assert getattr(plain, name)[0][0].shape == getattr(shared, name)[0][0].shape


def test_the_cache_handed_back_goes_on(tiny_model):
    """`past_key_values` of a shared run holds all rows, and continues them as that of a plain run does."""
    (plain, shared), _ = both(
        tiny_model, PROMPTS["even"], max_gen_len=3, seeds=1, eos_token_id=[], return_dict_in_generate=True
    )
    goes_on = [
        tiny_model.generate(out.sequences, past_key_values=out.past_key_values, max_gen_len=4, temperature=0)
        for out in (plain, shared)
    ]
    assert goes_on[0].tolist() == goes_on[1].tolist()


def test_bad_logits_of_a_shared_prompt_are_named(tiny_model):
    """The first row and the position, as without sharing."""

    def spoil(model, args, kwargs, output):
        if output.logits.shape[1] == kwargs["input_ids"].shape[1]:
            output.logits[kwargs["input_ids"] == 70] = float("nan")

    hook = tiny_model.register_forward_hook(spoil, with_kwargs=True)
    position = HEADER.index(70) + 1
    try:
        for prompts in (PROMPTS["equal"], PROMPTS["even"]):
            for share in (False, True):
                with pytest.raises(ValueError, match=f"position {position} of row 0 hold nan or inf"):
                    tiny_model.generate(prompts, max_gen_len=2, echo=True, logprobs=True, share_prefix=share)
    finally:
        hook.remove()


@pytest.mark.parametrize("value", [1, 0, "yes", "auto"])
def test_share_prefix_is_a_switch(tiny_model, value):
    """Nothing else counts as True or False."""
    with pytest.raises(TypeError, match=f"share_prefix must be True or False, got {value!r}: leave it out"):
        tiny_model.generate([HEADER], max_gen_len=1, share_prefix=value)


def test_a_few_equal_rows_beside_others_share_what_all_begin_with(tiny_model):
    """By default: repeating two rows saves too little by itself, and their beginning is shared with the third."""
    header = [1, *(20 + 7 * i % 900 for i in range(200))]
    prompts = [[*header, 5, 6], [*header, 5, 6], [*header, 7, 8]]
    plain = tiny_model.generate(prompts, max_gen_len=4, temperature=0, share_prefix=False)
    tiny_model.generate(prompts, max_gen_len=1)
    with Forwards(tiny_model) as forwards:
        same_answers(plain, tiny_model.generate(prompts, max_gen_len=4, temperature=0))
    assert forwards.shapes[:2] == [(1, 201 - 1), (3, 3)]


WINDOWED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "sliding_window": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@pytest.mark.parametrize("kind", ["MistralForCausalLM", "Gemma2ForCausalLM"])
@pytest.mark.parametrize("share", [True, None])
def test_rows_behind_padding_share_beginnings_longer_than_a_window(kind, share):
    """A window of 6, 14 tokens in common, rows that begin in columns 0 to 9: each row as it is alone."""
    torch.manual_seed(0)
    config = getattr(transformers, kind.replace("ForCausalLM", "Config"))(**WINDOWED)
    model = with_llama_generation(getattr(transformers, kind)(config).eval())
    header = [1, *range(20, 33)]
    prompts = [[*header, *range(40, 40 + n)] for n in (1, 4, 10)]
    out = model.generate(prompts, max_gen_len=8, temperature=0, logprobs=True, echo=True, share_prefix=share)
    for row, prompt in enumerate(prompts):
        alone = model.generate([prompt], max_gen_len=8, temperature=0, logprobs=True, echo=True)
        assert out.tokens[row] == alone.tokens[0]
        assert out.logprobs[row] == pytest.approx(alone.logprobs[0], abs=ROUNDING)


@pytest.mark.parametrize("option", [{"cache_implementation": "static"}, {"use_cache": False}, {"max_time": 60.0}])
def test_a_call_that_says_what_cache_to_use_is_left_alone(tiny_model, option):
    """Static caches, none at all, and a time limit: the same forwards as without sharing."""
    (plain, shared), forwards = both(tiny_model, PROMPTS["equal"], max_gen_len=2, seeds=1, **option)
    assert shared.tokens == plain.tokens
    assert forwards[0].shapes == forwards[1].shapes


def test_equal_rows_behind_a_common_beginning_that_is_worth_sharing(tiny_model):
    """Where the beginning is shared and the few equal columns after it are not, each row has its own place."""
    header = [1, *range(3, 203)]
    prompts = [[*header, 5, 6], [*header, 5, 6], [*header, 8, 9]]
    expected = [tiny_model.generate([prompt], max_gen_len=3, seeds=[7]).tokens[0] for prompt in prompts]
    assert tiny_model.generate(prompts, max_gen_len=3, seeds=[7, 7, 7]).tokens == expected
