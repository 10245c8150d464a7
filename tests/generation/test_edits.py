"""Options and processors that edit logits, and stopping criteria."""

import math

import pytest
import torch
import transformers
from transformers import LogitsProcessor, StoppingCriteria

from tests.bounds import ROUNDING
from tests.generation.helpers import EOS, OFTEN, RAGGED, SHORT, at, close, plain_logprobs


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
        assert out.logprobs[0][position] == pytest.approx(
            float(edited.log_softmax(-1)[row[position]]), abs=1.8 * ROUNDING
        )
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
