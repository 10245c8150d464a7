"""`score_tokens` against lm-evaluation-harness, an independent implementation of the same figure."""

import pytest

from hf_llama_sampling import Tokenizer
from tests.bounds import ROUNDING
from tests.conftest import TINY

pytest.importorskip("lm_eval", reason="needs lm_eval: install the extra lm-eval")
# The harness' own imports, and the libraries that it pulls in, warn on their own account.
pytestmark = pytest.mark.filterwarnings("ignore")

REQUESTS = [
    ("ROMEO:", "\nBut soft, what light"),
    ("The king is", " dead, long live the king."),
    ("First Citizen:\nWe are accounted poor", " citizens"),
    ("A much longer context, so that the batch is ragged, and ends with a", " word"),
]


@pytest.fixture(scope="module")
def harness(tiny_model):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    return HFLM(pretrained=tiny_model, tokenizer=AutoTokenizer.from_pretrained(TINY), batch_size=3)


def test_loglikelihood_is_the_harness_one(harness, tiny_model):
    """The sum over a continuation's tokens, and whether it is the greedy one, agree within float32 rounding."""
    from lm_eval.api.instance import Instance

    instances = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(REQUESTS)
    ]
    theirs = harness.loglikelihood(instances, disable_tqdm=True)

    pairs = [harness._encode_pair(*pair) for pair in REQUESTS]
    scores = tiny_model.score_tokens([context + continuation for context, continuation in pairs], top_logprobs=1)
    for (context, continuation), row, best, (total, greedy) in zip(
        pairs, scores.logprobs, scores.top_logprobs, theirs, strict=True
    ):
        start = len(context)
        assert sum(row[start:]) == pytest.approx(total, abs=len(continuation) * ROUNDING)
        assert all(best[start + i][0][0] == token for i, token in enumerate(continuation)) == greedy


def test_the_texts_are_encoded_alike(harness):
    """Both sides score the same ids: BOS and SentencePiece's pieces."""
    plain = Tokenizer(TINY / "tokenizer.model")
    for context, continuation in REQUESTS:
        left, right = harness._encode_pair(context, continuation)
        assert left + right == plain.encode(context + continuation, bos=True, eos=False)
