"""`generate` against the rule in plain Python, over random combinations of everything that a call takes."""

from typing import Any

import hypothesis
import pytest
import torch

from hf_llama_sampling import LlamaGenerateOutput
from tests.conftest import examples
from tests.model_based import rule
from tests.model_based.calls import PAD, Call, Collector, calls
from tests.model_based.rule import Row, logits_after, rounding, tiny

pytestmark = pytest.mark.slow


def bound(call: Call, text: list[int]) -> float:
    """How far a logprob may be off: the raw logits' rounding, through a penalty and a temperature."""
    coldest = min((t for t in call.temperatures() if t), default=1.0)
    return rounding(logits_after(tuple(text))) * 2 / min(1.0, coldest)


def answer(call: Call, row: Row) -> slice:
    """The part of a row's text that is its answer."""
    start = 0 if call.wanted.get("echo") else len(row.prompt)
    first = start if call.compat == "meta" else len(row.prompt)
    ends = (place for place in range(first, len(row.text)) if row.text[place] in call.eos)
    return slice(start, next(ends, len(row.text)))


def tables(row: Row) -> list[torch.Tensor]:
    """Per token of the text, the (V,) logprobs that it stands under; the first has none."""
    prompt = torch.log_softmax(logits_after(tuple(row.prompt)), -1)
    return [torch.zeros(rule.VOCAB), *prompt[: len(row.prompt) - 1], *row.tables]


def check_tensor(call: Call, rows: list[Row | None], sequences: torch.Tensor) -> None:
    """transformers' convention: prompts end in one column, completions keep their EOS, then pad."""
    longest = max(map(len, call.prompts))
    for place, row in enumerate(rows):
        if row is not None:
            found = sequences[place].tolist()
            expected = [PAD] * (longest - len(row.prompt)) + row.text
            assert found[: len(expected)] == expected
            assert set(found[len(expected) :]) <= {PAD}


def check_row(call: Call, row: Row, place: int, out: LlamaGenerateOutput, *, unshifted: bool) -> None:
    """Tokens, logprobs of all kinds and the reason of one row."""
    part, text = answer(call, row), row.text
    assert out.tokens[place] == text[part]
    assert out.finish_reason[place] == row.reason
    allowed = bound(call, text)
    under = tables(row)
    if unshifted:  # the reference's quirk: position t under the logits at t
        under = list(torch.log_softmax(logits_after(tuple(text)), -1))
    if call.wanted.get("logprobs"):
        expected = [float(table[token]) for table, token in zip(under, text, strict=True)][part]
        assert out.logprobs[place] == pytest.approx(expected, abs=allowed)
        sampled = ([0.0] * len(row.prompt) + row.sampled)[part]
        assert out.sampled_logprobs[place] == pytest.approx(sampled, abs=2 * allowed)
    count = call.wanted.get("top_logprobs", 0)
    if count:
        for position, best in list(enumerate(out.top_logprobs[place], part.start)):
            if position == 0 and not unshifted:
                assert best == []
                continue
            values, _ = under[position].topk(count)
            assert [value for _, value in best] == pytest.approx(values.tolist(), abs=allowed)
            for token, value in best:
                assert value == pytest.approx(float(under[position][token]), abs=allowed)


def check_logits(call: Call, rows: list[Row | None], out: LlamaGenerateOutput) -> None:
    """`output_logits`: the model's own, before any edit, in each row's own step."""
    for place, row in enumerate(rows):
        for step in range(len(row.made) if row is not None else 0):
            raw = logits_after(tuple(row.text[: len(row.prompt) + step]))[-1]
            torch.testing.assert_close(out.logits[step][place], raw, atol=rounding(raw), rtol=0)


@hypothesis.settings(**examples(150))
@hypothesis.given(call=calls())
def test_any_call_equals_the_rule(call):
    """Tokens, logprobs, reasons, the sequences tensor, streams and settings of any combination are the rule's."""
    rows = call.rows()
    hypothesis.assume(not any(row.open for row in rows if row is not None))
    asked: dict[str, Any] = call.keywords()
    torch.manual_seed(call.one_seed())
    if any(row.empty for row in rows if row is not None):
        with pytest.raises(ValueError, match=r"position \d+ of row \d+"):
            tiny().generate(**asked)
        return
    out = tiny().generate(**asked)

    more = {"echo", "logprobs", "top_logprobs", "return_dict_in_generate"} & call.wanted.keys()
    check_tensor(call, rows, out if isinstance(out, torch.Tensor) else out.sequences)
    streamer = asked.get("streamer")
    if isinstance(streamer, Collector):
        made = rows[0]
        assert streamer.ended == 1
        assert made is None or streamer.ids[: len(made.text)] == made.text
    if call.form != "lists" and not more:
        assert isinstance(out, torch.Tensor)
        return
    assert isinstance(out, LlamaGenerateOutput)
    unshifted = call.compat == "meta" and not call.ragged and not any(call.limits())
    for place, row in enumerate(rows):
        if row is not None:
            check_row(call, row, place, out, unshifted=unshifted)
    if call.wanted.get("output_logits") and out.logits is not None:
        check_logits(call, rows, out)
    assert (out.logprobs is None) == (not call.wanted.get("logprobs"))
    assert (out.top_logprobs is None) == (not call.wanted.get("top_logprobs"))
    expected = {"eos_token_id": call.eos, "num_return_sequences": call.copies, "compat": call.compat}
    assert {name: out.settings[name] for name in expected} == expected
    assert out.settings["schedule"] in {"auto": ("reference", "padded")}.get(call.schedule, (call.schedule,))
