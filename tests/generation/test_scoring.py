"""`score_tokens`: raw logprobs of given texts, whatever the batch and the chunks."""

import random

import pytest

from tests.generation.helpers import BOS, RAGGED, at, close, padded, plain_logprobs


@pytest.mark.slow
def test_score_tokens_equals_a_plain_forward(tiny_model):
    """Within float32 rounding, whatever the batch-mates, as lists or padded on either side, in chunks of any size."""
    draw = random.Random(3)
    texts = [[draw.randrange(1024) for _ in range(draw.choice([1, 2, 5, 30, 100]))] for _ in range(8)]
    expected = [at(plain_logprobs(tiny_model, text), text) for text in texts]
    for chunk_bytes in (1, 1 << 20, 64 << 20):
        close(tiny_model.score_tokens(texts, chunk_bytes=chunk_bytes).logprobs, expected)
    for row in (0, 3, 7):
        close(tiny_model.score_tokens([texts[row]]).logprobs, [expected[row]])
    for side in ("left", "right"):
        given = padded(texts, side)
        scored = tiny_model.score_tokens(given["inputs"], attention_mask=given["attention_mask"])
        close(scored.logprobs, expected)
    assert scored.top_logprobs is None


def test_score_tokens_gives_the_best_tokens_too(tiny_model):
    """top_logprobs at every position but the first."""
    scored = tiny_model.score_tokens(RAGGED, top_logprobs=2, chunk_bytes=1)
    for text, best in zip(RAGGED, scored.top_logprobs, strict=True):
        values, ids = plain_logprobs(tiny_model, text)[1:].topk(2)
        assert best[0] == []
        assert [[token for token, _ in place] for place in best[1:]] == ids.tolist()
        close([[value for _, value in place] for place in best[1:]], values.tolist())


def test_score_tokens_takes_the_models_whole_context(tiny_model):
    """A text may be as long as the model allows, and no longer."""
    text = [BOS, *range(3, 514)]
    assert len(tiny_model.score_tokens([text]).logprobs[0]) == 512
    with pytest.raises(ValueError, match="the model's context of 512 tokens, but row 1 has 513"):
        tiny_model.score_tokens([text, [*text, 5]])


def test_scores_of_a_completion_are_its_logprobs(tiny_model):
    """generate's logprobs and score_tokens of the same text agree."""
    out = tiny_model.generate(RAGGED, max_gen_len=8, seeds=1, logprobs=True, echo=True)
    close(tiny_model.score_tokens(out.tokens).logprobs, out.logprobs)
