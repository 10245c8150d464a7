"""Logits that hold nan or inf are named by row and position, and nobody's logits end nothing."""

import contextlib
import math

import pytest
import torch
from transformers import LogitsProcessor

from tests.generation.helpers import RAGGED, SHORT, STREAMS, Plant, close

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def after_token(model, token, value):
    """Put a value into the logits behind a token, wherever it stands."""

    def plant(module, args, kwargs, output):
        ids, kept = kwargs["input_ids"], kwargs.get("logits_to_keep", 0)
        ids = ids[:, kept] if isinstance(kept, torch.Tensor) else ids[:, -kept:]
        output.logits[:, :, 17].masked_fill_(ids == token, value)

    handle = model.register_forward_hook(plant, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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
    assert (RAGGED[1][3], RAGGED[0][-1]) == (9, 6)
    with after_token(tiny_model, 9, value), pytest.raises(ValueError, match="position 4 of row 1 hold nan or inf"):
        tiny_model.score_tokens(RAGGED, chunk_bytes=chunk_bytes)
    plain = tiny_model.generate(RAGGED, schedule="padded", **asked), tiny_model.score_tokens(RAGGED)
    with Plant(tiny_model, 0, 2, value):  # column 2 of row 0 is padding: its prompt begins in column 4
        assert tiny_model.generate(RAGGED, schedule="padded", **asked).logprobs == plain[0].logprobs
    with after_token(tiny_model, 0, value), after_token(tiny_model, 6, value):  # padding, and a text's last token
        close(tiny_model.score_tokens(RAGGED, chunk_bytes=chunk_bytes).logprobs, plain[1].logprobs)


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
