"""Streamers get the tokens as they come."""

import pytest
import torch
from transformers import LogitsProcessor, TextIteratorStreamer, TextStreamer

from tests.generation.helpers import RAGGED, SHORT, Collect


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
    for steps in (0, 1):
        padded = Collect()
        out = tiny_model.generate(RAGGED, max_gen_len=steps, streamer=padded, schedule="padded", pad_token_id=0)
        assert padded.ended and torch.equal(padded.parts[0], out.sequences[:, : padded.parts[0].shape[1]])


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


class Interrupt(LogitsProcessor):
    """Raise at the third token."""

    def __init__(self, error):
        self.error = error

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == 5:
            raise self.error
        return scores


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"temperature": -1}, ValueError),
        ({"temprature": 1}, TypeError),
        ({"inputs": [[]]}, ValueError),
        ({"max_gen_len": None}, ValueError),
        ({"num_beams": 4}, ValueError),
        ({"logits_processor": [Interrupt(KeyboardInterrupt())]}, KeyboardInterrupt),
        ({"logits_processor": [Interrupt(RuntimeError("out of memory"))]}, RuntimeError),
        ({"prefix_allowed_tokens_fn": lambda row, ids: []}, ValueError),
        ({"stopping_criteria": [lambda ids, scores, **_: 1 / 0]}, ZeroDivisionError),
    ],
)
def test_a_reader_never_waits_for_ever(tiny_model, tiny_tokenizer, wrong, error):
    """Whatever is raised, and whenever: the stream is ended first, once, and the model works at once again."""
    asked = {"inputs": [SHORT], "max_gen_len": 6, "seeds": 1, "eos_token_id": []}
    texts = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, timeout=60)
    with pytest.raises(error):
        tiny_model.generate(**{**asked, **wrong}, streamer=texts)
    assert list(texts) is not None  # ends, without the queue's timeout
    assert texts.text_queue.empty()
    again = Collect()
    out = tiny_model.generate(**asked, streamer=again)
    assert again.ended and len(again.parts) == 7 and len(out.tokens[0]) == 6


def test_a_streamer_that_fails_is_ended_all_the_same(tiny_model, tiny_tokenizer):
    """An error in `put`, and one in `end` after it: the first one is what the caller gets."""

    class Broken(TextIteratorStreamer):
        def put(self, value):
            raise OSError("disk full")

        def end(self):
            raise RuntimeError("cannot decode")

    broken = Broken(tiny_tokenizer, timeout=60)
    with pytest.raises(OSError, match="disk full"):
        tiny_model.generate([SHORT], max_gen_len=2, streamer=broken)
    assert list(broken) == [""]
