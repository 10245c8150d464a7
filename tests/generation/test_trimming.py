"""What of a row is its answer: pure Python."""

import pytest

from hf_llama_sampling.generation.trimming import answer_span, finish_reason

EOS = {2, 7}

# row, length of its prompt, then the answer: without echo; with it; with it under compat="meta"
ROWS = [
    pytest.param([1, 5, 6, 8, 9], 2, [6, 8, 9], [1, 5, 6, 8, 9], [1, 5, 6, 8, 9], id="no EOS"),
    pytest.param([1, 5, 6, 2, 9], 2, [6], [1, 5, 6], [1, 5, 6], id="EOS in the completion"),
    pytest.param([1, 2, 5, 6, 2, 9], 3, [6], [1, 2, 5, 6], [1], id="EOS in the prompt too"),
    pytest.param([1, 2, 5, 6, 9], 3, [6, 9], [1, 2, 5, 6, 9], [1], id="EOS in the prompt alone"),
    pytest.param([1, 5, 2], 2, [], [1, 5], [1, 5], id="EOS at once"),
    pytest.param([1, 5], 2, [], [1, 5], [1, 5], id="nothing generated"),
    pytest.param([2], 1, [], [2], [], id="a prompt of EOS alone"),
    pytest.param([1, 5, 6, 7, 2], 2, [6], [1, 5, 6], [1, 5, 6], id="the first of two EOS ids"),
]


@pytest.mark.parametrize(("row", "prompt_len", "plain", "echoed", "as_meta"), ROWS)
def test_answers(row, prompt_len, plain, echoed, as_meta):
    """Cut before the first EOS of the completion; with echo, Meta's also looks in the prompt."""

    def answer(**how):
        return row[answer_span(row, prompt_len, eos_ids=EOS, **how)]

    assert answer(echo=False, compat="fixed") == plain
    assert answer(echo=False, compat="meta") == plain
    assert answer(echo=True, compat="fixed") == echoed
    assert answer(echo=True, compat="meta") == as_meta


@pytest.mark.parametrize("compat", ["meta", "fixed"])
def test_without_eos_ids_nothing_is_cut(compat):
    """A model may have no EOS."""
    span = answer_span([1, 2, 3, 2], 2, echo=True, eos_ids=(), compat=compat)
    assert span == slice(0, 4)


def test_logprobs_are_cut_alike():
    """The span fits every list that runs beside the row."""
    row, scores = [1, 5, 6, 2, 9], [0.0, -1.0, -2.0, -3.0, -4.0]
    assert scores[answer_span(row, 2, echo=False, eos_ids=EOS, compat="fixed")] == [-2.0]


@pytest.mark.parametrize(
    ("completion", "stopped", "reason"),
    [([6, 8], False, "length"), ([6, 2], False, "stop"), ([6, 8], True, "stop"), ([], False, "length")],
)
def test_finish_reasons(completion, stopped, reason):
    """An EOS in the completion or a criterion stops a row; otherwise it ran to its limit."""
    assert finish_reason(completion, EOS, stopped=stopped) == reason
