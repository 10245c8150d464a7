"""What `generate` returns: types, transformers' and Meta's convention, reasons, nothing to generate."""

import copy
import warnings

import pytest
import torch
from transformers.utils import ModelOutput

from hf_llama_sampling import LlamaGenerateOutput
from tests.bounds import ROUNDING
from tests.generation.helpers import EOS, OFTEN, RAGGED, SHORT, close, padded


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


@pytest.mark.parametrize("as_given", [lambda batch: batch, lambda batch: {"inputs": batch}])
def test_completions_follow_the_columns_that_were_given(tiny_model, as_given):
    """Prompts padded beyond the longest, to a fixed width or a multiple, keep it: `sequences[:, T:]` is what is new."""
    wide = padded([*RAGGED, [9] * 24], "right")
    given = as_given({"input_ids": wide["inputs"][:-1], "attention_mask": wide["attention_mask"][:-1]})
    asked = {"max_gen_len": 4, "temperature": 0, "eos_token_id": [], "return_dict_in_generate": True}
    model = copy.deepcopy(tiny_model)  # transformers leaves hooks on it
    model.set_attn_implementation("eager")
    out = model.generate(**given, **asked, output_hidden_states=True, output_attentions=True)
    assert out.sequences[:, 24:].tolist() == tiny_model.generate(RAGGED, **asked).tokens
    for row, prompt in enumerate(RAGGED):
        alone = model(torch.tensor([prompt]), output_hidden_states=True, output_attentions=True)
        own = slice(24 - len(prompt), 24)
        same = {"atol": ROUNDING, "rtol": 0}
        torch.testing.assert_close(out.hidden_states[0][1][row, own], alone.hidden_states[1][0], **same)
        torch.testing.assert_close(out.attentions[0][1][row, :, own, own], alone.attentions[1][0], **same)
    assert [step[0].shape[-1] for step in out.attentions] == [24, 25, 26, 27]


def test_extra_outputs_of_a_ragged_batch_line_up_with_rows_or_are_refused(tiny_model):
    """`output_logits` are by new token in both schedules; what comes by column is refused where rows share none."""
    asked = {"max_gen_len": 4, "seeds": 1, "eos_token_id": []}
    of = {
        schedule: tiny_model.generate(RAGGED, **asked, schedule=schedule, output_logits=True).logits
        for schedule in ("reference", "padded")
    }
    assert len(of["reference"]) == len(of["padded"]) == 4
    torch.testing.assert_close(torch.stack(of["reference"]), torch.stack(of["padded"]), atol=ROUNDING, rtol=0)
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match=f'{name} needs prompts that end in one column.*schedule="padded"'):
            tiny_model.generate(RAGGED, **asked, schedule="reference", **{name: True})


@pytest.mark.slow
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


def test_no_warning_is_given(tiny_model):
    """Neither transformers nor we warn in an ordinary call (pytest makes warnings errors; this one looks at all)."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        tiny_model.generate(RAGGED, max_gen_len=3, logprobs=True, echo=True, seeds=1)
    assert found == []
