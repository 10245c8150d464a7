"""Answers recorded from Meta's own code, through every door. Equal tokens; logprobs within float32 rounding."""

import json

import pytest
import torch

from hf_llama_sampling import Llama
from hf_llama_sampling.reference import reference_generate
from tests.bounds import rounding
from tests.conftest import GOLDEN, OTHER_DRAWS, draws_as_recorded

CASES = json.loads((GOLDEN / "generate.json").read_text())
EOS = CASES["eos_id"]
ARGUMENTS = ("max_gen_len", "temperature", "top_p", "logprobs", "echo")


class Ids:
    """A tokenizer of the golden model's vocabulary that nobody asks for text."""

    n_words, bos_id, eos_id, pad_id = CASES["vocab_size"], CASES["bos_id"], EOS, CASES["pad_id"]

    def encode(self, s, bos, eos):
        raise AssertionError("generate needs no text")

    decode = encode


def by_reference(model, case):
    arguments = {name: case[name] for name in (*ARGUMENTS, "max_seq_len")}
    return reference_generate(model, case["prompt_tokens"], eos_ids=[EOS], **arguments)


def by_llama(model, case):
    llama = Llama(model, Ids(), max_seq_len=case["max_seq_len"])
    return llama.generate(case["prompt_tokens"], **{name: case[name] for name in ARGUMENTS})


def by_model(schedule):
    def run(model, case):
        arguments = {name: case[name] for name in (*ARGUMENTS, "max_seq_len")}
        output = model.generate(case["prompt_tokens"], compat="meta", schedule=schedule, **arguments)
        return output.tokens, output.logprobs

    return run


DOORS = {
    "reference": by_reference,
    "llama": by_llama,
    **{schedule: by_model(schedule) for schedule in ("reference", "padded", "auto")},
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
def test_recorded_answers(golden_model, case, door):
    """Every recorded call gives its recorded answer, and leaves the generator as the reference does."""
    if not draws_as_recorded(case["seed"], case["rng_canary"]) and case["temperature"] > 0:
        pytest.skip(OTHER_DRAWS)
    tokens, logprobs = DOORS[door](golden_model, case)
    left = torch.get_rng_state()

    assert tokens == case["tokens"]
    if case["logprobs"]:
        assert [len(row) for row in logprobs] == [len(row) for row in case["token_logprobs"]]
        for ours, theirs in zip(logprobs, case["token_logprobs"], strict=True):
            assert ours == pytest.approx(theirs, rel=0, abs=rounding(golden_model))
    else:
        assert logprobs is None

    torch.manual_seed(case["seed"])
    by_reference(golden_model, case)
    assert torch.equal(left, torch.get_rng_state())


def test_fixed_mends_the_unshifted_scores(golden_model):
    """Quirk (a): with nothing to generate and equal lengths the reference scores position t against the token at t."""
    case = next(case for case in CASES["cases"] if "unshifted" in case["name"])
    arguments = {name: case[name] for name in ARGUMENTS}
    output = golden_model.generate(case["prompt_tokens"], compat="fixed", **arguments)
    ids = torch.tensor(case["prompt_tokens"])
    raw = golden_model(ids).logits.log_softmax(-1)
    for row, (ours, theirs) in enumerate(zip(output.logprobs, case["token_logprobs"], strict=True)):
        assert ours[0] == 0.0
        shifted = raw[row, :-1].gather(-1, ids[row, 1:, None]).squeeze(-1)
        assert ours[1:] == pytest.approx(shifted.tolist(), abs=rounding(golden_model))
        assert ours != pytest.approx(theirs, abs=100 * rounding(golden_model))


def test_fixed_keeps_an_echoed_prompt_whole(golden_model):
    """Quirk (b): with echo the reference also cuts at an EOS inside the prompt."""
    case = next(case for case in CASES["cases"] if case["name"] == "EOS inside the prompt, echo=True")
    bare = next(case for case in CASES["cases"] if case["name"] == "EOS inside the prompt, echo=False")
    output = golden_model.generate(case["prompt_tokens"], compat="fixed", **{name: case[name] for name in ARGUMENTS})
    for row, (prompt, completion) in enumerate(zip(case["prompt_tokens"], bare["tokens"], strict=True)):
        assert output.tokens[row] == prompt + completion
