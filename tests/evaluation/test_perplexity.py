"""Perplexities of scored texts against a plain forward and lm-evaluation-harness' own definitions."""

import json
import math

import pytest
import torch

from hf_llama_sampling import Llama, Tokenizer
from hf_llama_sampling.evaluation.levels import LEAST, NAMES, as_percent, level_of
from hf_llama_sampling.evaluation.perplexity import Perplexity, first_context, score_texts, total
from hf_llama_sampling.evaluation.terminal import write_scores
from tests.bounds import ROUNDING
from tests.conftest import TINY

TEXT = "To be, or not to be:\n  that is the \u4f60 question. "


@pytest.fixture(scope="module")
def llama(tiny_model):
    """The bundled model behind the llama-compatible API."""
    return Llama(tiny_model, Tokenizer(TINY / "tokenizer.model"))


def test_each_token_has_the_logprob_of_a_plain_forward(llama, tiny_model):
    """The first one after BOS; the alternatives are the best of the same row."""
    (scored,) = score_texts(llama, [("a", TEXT)], top_logprobs=3)
    ids = torch.tensor([[1, *scored.ids]])
    rows = tiny_model(ids).logits[0, :-1].float().log_softmax(-1)
    expected = rows.gather(-1, ids[0, 1:, None])[:, 0]
    assert scored.logprobs == pytest.approx(expected.tolist(), abs=ROUNDING)
    best = rows.topk(3).values.tolist()
    assert [[value for _, value in top] for top in scored.top_logprobs] == [
        pytest.approx(row, abs=ROUNDING) for row in best
    ]


def test_the_first_token_is_scored_or_left_out_and_never_zero(llama):
    """After BOS, after an id, or not at all: then it is None, and the perplexity divides by the others alone."""
    own, after_two, left_out = (score_texts(llama, [("a", TEXT)], bos=bos)[0] for bos in (None, 2, False))
    assert own.first_token == "scored after <s>" and own.perplexity.scored == len(own.ids)
    assert own.logprobs[0] < 0 and after_two.logprobs[0] < 0 and own.logprobs[0] != after_two.logprobs[0]
    assert left_out.logprobs[0] is None and left_out.perplexity.scored == len(left_out.ids) - 1
    rest = left_out.logprobs[1:]
    assert left_out.perplexity.per_token == pytest.approx(math.exp(-sum(rest) / len(rest)))


def test_a_tokenizer_without_bos_begins_with_eos(llama):
    """The harness' convention; with neither, the first token is not scored."""

    class Without:
        def __init__(self, bos, eos):
            self.tokenizer = type("Ids", (), {"bos_id": bos, "eos_id": eos})

    assert [first_context(Without(*ids), None) for ids in [(1, 2), (-1, 2), (-1, -1)]] == [1, 2, None]
    assert first_context(llama, True) == 1 and first_context(llama, False) is None and first_context(llama, 0) == 0
    with pytest.raises(ValueError, match="this one has none"):
        first_context(Without(-1, 2), True)


def test_long_texts_slide_a_window(llama):
    """Each token counts once; a smaller stride gives each more to see. Short texts are left as they are."""
    texts = [("short", "Hi"), ("long", TEXT * 4)]
    narrow, wide = (score_texts(llama, texts, max_seq_len=16, stride=stride) for stride in (None, 15))
    assert [text.window for text in narrow] == [None, (16, 8)] and wide[1].window == (16, 15)
    assert narrow[1].perplexity.scored == wide[1].perplexity.scored == len(narrow[1].ids)
    direct = llama.model.score_tokens([narrow[1].ids], bos=1, max_seq_len=16, stride=8)
    assert narrow[1].perplexity.logprob == pytest.approx(direct.totals[0], abs=ROUNDING)


def test_figures_are_the_harness_own(llama, tiny_model):
    """Its rolling loglikelihood in the same windows, its words and bytes, its three metrics; over two texts, too."""
    pytest.importorskip("lm_eval", reason="needs lm_eval: install the extra lm-eval")
    from lm_eval.api import metrics
    from lm_eval.api.task import Task

    texts = [("a", TEXT * 2), ("b", "ROMEO:\nBut soft,  what light")]
    scored = score_texts(llama, texts, max_seq_len=512)
    for choose in (lambda found: found[:1], lambda found: found):
        found = choose(scored)
        logprobs = [
            sum(llama.model.score_continuations([[1]], [[one.ids]]).totals[0])  # independent of `score_tokens`' windows
            for one in found
        ]
        words = list(zip(logprobs, (Task.count_words(one.text) for one in found), strict=True))
        sizes = list(zip(logprobs, (Task.count_bytes(one.text) for one in found), strict=True))
        figures = total(found)
        assert figures.per_word == pytest.approx(metrics.weighted_perplexity(words), rel=1e-4)
        assert figures.per_byte == pytest.approx(metrics.weighted_perplexity(sizes), rel=1e-4)
        assert figures.bits_per_byte == pytest.approx(metrics.bits_per_byte(sizes), rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_sum_is_the_harness_rolling_loglikelihood(llama, tiny_model, tiny_tokenizer):
    """Of a text of one window, scored after BOS, by the harness' own model class."""
    pytest.importorskip("lm_eval", reason="needs lm_eval: install the extra lm-eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=tiny_model, tokenizer=tiny_tokenizer, add_bos_token=False)
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(TEXT,), idx=0)
    (expected,) = theirs.loglikelihood_rolling([request], disable_tqdm=True)
    (scored,) = score_texts(llama, [("a", TEXT)])
    assert scored.perplexity.logprob == pytest.approx(expected, abs=len(scored.ids) * ROUNDING)


def test_what_a_float_cannot_hold_is_infinite_and_null_in_json():
    """A long text without white space is one word; its perplexity per word has hundreds of digits."""
    figures = Perplexity(tokens=400, scored=400, words=1, bytes=1200, logprob=-1000.0)
    assert figures.per_word == math.inf and figures.per_token == pytest.approx(math.exp(2.5))
    record = json.loads(json.dumps(figures.record(), allow_nan=False))
    assert record["word_perplexity"] is None and record["logprob"] == -1000.0


def test_the_record_adds_up(llama):
    """Offsets lie in the text, lists are as long as the ids, a character of three tokens is spelled by all three."""
    (scored,) = score_texts(llama, [("a.txt", TEXT)], top_logprobs=2)
    record = scored.record()
    lists = ("ids", "tokens", "offsets", "logprobs", "top_logprobs")
    assert {len(record[name]) for name in lists} == {record["num_tokens"]}
    cut = [TEXT[start:end] for start, end in record["offsets"]]
    assert cut.count("\u4f60") == 3 and record["tokens"][0] == cut[0] == "To"
    assert [len(top) for top in record["top_logprobs"]] == [2] * len(record["ids"])
    assert record["logprob"] == pytest.approx(sum(record["logprobs"]))


@pytest.mark.parametrize("bos", [None, False])
def test_named_tokens_are_those_of_plain_forwards(llama, tiny_model, capsys, bos):
    """Logprob and rank at every position that is scored, in the record and in the text that is printed."""
    (scored,) = score_texts(llama, [("a", TEXT)], logprobs_of=[" king", 7], bos=bos)
    with torch.no_grad():
        logits = tiny_model(torch.tensor([[1, *scored.ids] if bos is None else scored.ids])).logits[0].double()
    expected = logits.log_softmax(-1)[:-1]
    found = scored.record()["logprobs_of"]
    assert len(found) == len(scored.ids) and (bos is None or found[0] == [])
    assert found[1][0]["token"] == " king"
    for place, row in zip(found if bos is None else found[1:], expected, strict=True):
        assert [one["id"] for one in place] == [542, 7]
        for one in place:
            assert one["logprob"] == pytest.approx(row[one["id"]].item(), abs=ROUNDING)
            # The ranks that logits allow which lie within the rounding of each other.
            above, equal = (int((row > row[one["id"]] + gap).sum()) for gap in (2 * ROUNDING, -2 * ROUNDING))
            assert above + 1 <= one["rank"] <= equal + 1
    write_scores([scored])
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"   king {found[-1][0]['logprob']:.4f} #{found[-1][0]['rank']}  " in last


@pytest.mark.parametrize(
    ("text", "bos", "words"),
    [("", None, "but poem is empty"), ("I", False, "nothing stands before the only token of poem")],
)
def test_a_text_without_a_score_is_refused_by_name(llama, text, bos, words):
    """Neither 0 nor nan is printed for it."""
    with pytest.raises(ValueError, match=words):
        score_texts(llama, [("fine", "Good morning"), ("poem", text)], bos=bos)


def test_levels_cover_all_probabilities():
    """Each logprob has one of the six levels, by the bounds that the names say."""
    assert len(LEAST) == len(NAMES) == 6
    assert [level_of(math.log(p)) for p in (1, 0.5, 0.49, 0.2, 0.05, 0.01, 0.001, 0.0009)] == [0, 0, 1, 1, 2, 3, 4, 5]
    assert level_of(-math.inf) == 5 and level_of(1e-6) == 0
    assert [as_percent(value) for value in (0.0, math.log(0.123), math.log(0.00123))] == ["100%", "12.3%", "0.123%"]


def test_ids_that_the_tokenizer_does_not_know_have_a_name(llama, monkeypatch):
    """A model may embed more ids than its tokenizer has; one of them among the best is shown as its number."""
    (scored,) = score_texts(llama, [("a", TEXT)], top_logprobs=2)
    monkeypatch.setattr(llama.tokenizer, "n_words", 500)
    assert scored.token_text(3, 700) == "<700>"
    assert scored.token_text(3, llama.tokenizer.bos_id) == "<s>"
