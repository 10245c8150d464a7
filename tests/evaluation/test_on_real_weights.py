"""What people who measure models ask for, on the real 135M weights, against plain forwards and plain Python."""

import ast
import json
import math
import re
import runpy

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from hf_llama_sampling import Llama, batch
from hf_llama_sampling.batch.engine import Engine
from hf_llama_sampling.batch.requests import Request
from hf_llama_sampling.batch.settings import RunSettings
from hf_llama_sampling.evaluation.page import page
from hf_llama_sampling.evaluation.perplexity import score_texts, total
from tests.bounds import rounding
from tests.conftest import HERE

pytestmark = pytest.mark.weights

TEXTS = ["The capital of France is Paris, not Lyon.", "Is water wet? 你 say: Yes"]
TEMPERATURE, TOP_P = 0.8, 0.9


@pytest.fixture(scope="module")
def llama(weights, weights_tokenizer):
    return Llama(weights, weights_tokenizer, max_seq_len=64)


@pytest.fixture(scope="module")
def ids(weights_tokenizer):
    """The texts' tokens."""
    return [weights_tokenizer(text).input_ids for text in TEXTS]


@pytest.fixture(scope="module")
def forward(weights):
    """`forward(text)`: raw logprobs (T, V) after each token, in float64, by a plain forward; each text once."""
    known = {}

    def of(text):
        if tuple(text) not in known:
            with torch.no_grad():
                logits = weights(torch.tensor([text])).logits[0]
            known[tuple(text)] = logits.double().log_softmax(-1)
        return known[tuple(text)]

    return of


@pytest.fixture(scope="module")
def own(forward):
    """`own(text)`: the logprob of each token of a text from the second on."""
    return lambda text: [row[token].item() for row, token in zip(forward(text)[:-1], text[1:], strict=True)]


@pytest.fixture(scope="module")
def made(weights, ids):
    """A sampled completion of both texts with all scores."""
    asked = {"logprobs": True, "top_logprobs": 2, "sampling_logprobs": True, "logprobs_of": [[5], [7, 2]]}
    return weights.generate(ids, max_gen_len=8, temperature=TEMPERATURE, top_p=TOP_P, seeds=3, eos_token_id=[], **asked)


def test_scores_of_texts_named_tokens_and_spans(weights, ids, forward, own):
    """`score_tokens` with a start for each row: logprobs, the best, and named ones with ranks."""
    near, starts = rounding(weights), [0, 3]
    scored = weights.score_tokens(ids, start=starts, top_logprobs=2, logprobs_of=[[5], [7, 2]])
    for row, (text, start) in enumerate(zip(ids, starts, strict=True)):
        expected, first = forward(text), max(1, start)
        assert scored.logprobs[row][first - start :] == pytest.approx(own(text)[first - 1 :], abs=near)
        assert scored.counts[row] == len(text) - first
        for place in range(first, len(text)):
            dist = expected[place - 1]
            best = [value for _, value in scored.top_logprobs[row][place - start]]
            assert best == pytest.approx(dist.topk(2).values.tolist(), abs=near)
            for token, value, rank in scored.logprobs_of[row][place - start]:
                assert value == pytest.approx(dist[token].item(), abs=near)
                above, below = (int((dist > dist[token] + gap).sum()) for gap in (2 * near, -2 * near))
                assert above + 1 <= rank <= below + 1


def test_long_texts_and_perplexities(llama, weights, ids, own):
    """Windows of 8, 3 apart, after a BOS: each token from the window that reaches it first; sums per word and byte."""
    near, text, bos = rounding(weights), ids[1], llama.tokenizer.bos_id
    whole, at, begin, expected = [bos, *text], 1, 0, []
    while at < len(whole):
        part = whole[begin : begin + 8]
        expected += own(part)[at - begin - 1 :]
        at, begin = begin + len(part), begin + 3
    scored = weights.score_tokens([text], bos=bos, max_seq_len=8, stride=3)
    assert scored.logprobs[0] == pytest.approx(expected, abs=near) and scored.counts == [len(text)]
    figures = total(score_texts(llama, [("a", TEXTS[0]), ("b", TEXTS[1])]))
    sums = math.fsum(sum(own([bos, *row])) for row in ids)
    size, words = sum(len(one.encode()) for one in TEXTS), sum(len(one.split()) for one in TEXTS)
    bound = near * sum(map(len, ids))
    assert figures.logprob == pytest.approx(sums, abs=bound)
    assert math.log(figures.per_word) * words == pytest.approx(-sums, abs=bound)
    assert figures.bits_per_byte * size * math.log(2) == pytest.approx(-sums, abs=bound)


def test_the_three_distributions(weights, ids, made, forward):
    """Raw, after temperature, and after the nucleus with its mass, recomputed in float64."""
    near = rounding(weights)
    for row, prompt in enumerate(ids):
        text = prompt + made.tokens[row]
        for place, token in enumerate(made.tokens[row]):
            raw = forward(text)[len(prompt) + place - 1]
            scaled = (raw / TEMPERATURE).log_softmax(-1)
            probs = scaled.exp().sort(descending=True).values
            kept = probs[probs.cumsum(0) - probs <= TOP_P]
            assert made.logprobs[row][place] == pytest.approx(raw[token].item(), abs=near)
            assert made.temperature_logprobs[row][place] == pytest.approx(scaled[token].item(), abs=near / TEMPERATURE)
            # A token at the nucleus' edge may be in or out by rounding.
            mass, edge = kept.sum().item(), kept[-1].item()
            assert made.nucleus_mass[row][place] == pytest.approx(mass, abs=edge + near)
            drawn = made.temperature_logprobs[row][place] - math.log(made.nucleus_mass[row][place])
            assert made.sampled_logprobs[row][place] == pytest.approx(drawn, abs=1e-5)


def test_streams_and_stop_strings(llama, ids, made):
    """Events are the completion's tokens and scores; a stop string cuts text, tokens and scores before it."""
    asked = {"max_gen_len": 8, "temperature": TEMPERATURE, "top_p": TOP_P, "seeds": 3, "eos_token_id": []}
    scores = {"logprobs": True, "logprobs_of": [[5], [7, 2]], "sampling_logprobs": True}
    tokenizer = llama.tokenizer.tokenizer
    texts = [row.text for row in made.token_texts(tokenizer)]
    stop = [[texts[0][5:8]], None]
    events = list(llama.model.stream(ids, tokenizer=tokenizer, stop=stop, **asked, **scores))
    for row, text in enumerate(texts):
        tokens = [event for event in events if event.row == row and event.id is not None]
        (end,) = [event for event in events if event.row == row and event.id is None]
        expected = text.partition(stop[0][0])[0] if row == 0 else text
        assert "".join(event.text for event in [*tokens, end]) == expected
        assert end.stop_reason == (stop[0][0] if row == 0 else None)
        count = len(tokens)
        assert [event.id for event in tokens] == made.tokens[row][:count] and (count < 8) == (row == 0)
        near = rounding(llama.model)
        assert [event.logprob for event in tokens] == pytest.approx(made.logprobs[row][:count], abs=near)
        assert [event.nucleus_mass for event in tokens] == pytest.approx(made.nucleus_mass[row][:count], abs=2 * near)
        assert [[one[2] for one in event.logprobs_of] for event in tokens] == [
            [one[2] for one in place] for place in made.logprobs_of[row][:count]
        ]


def test_token_texts_and_the_completions_format(weights, weights_tokenizer, ids, own):
    """Bytes and pieces add up, also of a character of several tokens; the harness' parser finds the plain sums."""
    parser = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    out = weights.generate(ids, max_gen_len=1, temperature=0, echo=True, logprobs=True, top_logprobs=1, eos_token_id=[])
    for text, spelled in zip(TEXTS, out.token_texts(weights_tokenizer), strict=True):
        assert b"".join(spelled.bytes) == spelled.text.encode() and "".join(spelled.pieces) == spelled.text
        assert spelled.text.startswith(text)
    parsed = parser.parse_logprobs(out.to_openai(weights_tokenizer), tokens=ids, ctxlens=[2, 4])
    for (found, _), text, start in zip(parsed, ids, [2, 4], strict=True):
        assert found == pytest.approx(sum(own(text)[start - 1 :]), abs=rounding(weights) * len(text))


def test_multiple_choice_through_the_harness(llama, ids, own, forward):
    """`LlamaLM.loglikelihood`: sums of the continuations' tokens, and whether each is the most probable one."""
    pytest.importorskip("lm_eval", reason="needs lm_eval: install the extra lm-eval")
    from lm_eval.api.instance import Instance

    from hf_llama_sampling.evaluation import LlamaLM

    lm = LlamaLM(llama.model, llama.tokenizer.tokenizer)
    context, choices = "The capital of France is", [" Paris", " Lyon", " not Lyon"]
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=(context, choice), idx=place)
        for place, choice in enumerate(choices)
    ]
    header = lm.tok_encode(context)
    for (found, greedy), choice in zip(lm.loglikelihood(asked, disable_tqdm=True), choices, strict=True):
        text = lm.tok_encode(context + choice)
        assert found == pytest.approx(sum(own(text)[len(header) - 1 :]), abs=rounding(llama.model) * len(text))
        best = forward(text)[len(header) - 1 : -1].argmax(-1).tolist()
        assert greedy is (best == text[len(header) :])


def test_the_page_and_the_pictures(llama, forward, own, monkeypatch):
    """The page's data are the plain forward's logprobs; the nuclei that are drawn are those of its distributions."""
    (scored,) = score_texts(llama, [("a", TEXTS[1])], logprobs_of=[5])
    (data,) = re.findall(r'<script type="application/json" id="scores0">(.*?)</script>', page([scored], "model"))
    expected = own([llama.tokenizer.bos_id, *scored.ids])
    assert json.loads(data)["logprobs"] == pytest.approx(expected, abs=rounding(llama.model))
    monkeypatch.setattr(Llama, "build", staticmethod(lambda *_, **__: llama))
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    runpy.run_path(str(HERE.parent / "examples" / "plot_sampling.py"))["main"]("sampling.png")
    _, flat, peaked, _ = plt.gcf().axes
    for axes in (flat, peaked):
        text = axes.get_title().partition("after ")[2]
        bos = [llama.tokenizer.bos_id] * (llama.tokenizer.bos_id >= 0)
        ids = bos + llama.tokenizer.encode(ast.literal_eval(text), bos=False, eos=False)
        probs = forward(ids)[-1].exp().sort(descending=True).values
        kept = int((probs.cumsum(0) - probs <= 0.9).sum())
        # The edge may move by a rank where float32 sums round.
        assert axes.lines[0].get_xdata()[0] == pytest.approx(kept + 0.5, abs=1 + 0.01 * kept)
    plt.close("all")


def test_batch_records(llama, own, tmp_path):
    """Prompt and generation are the decoded whole; a record's stop strings cut; scores are the plain forward's."""
    source, vowels = tmp_path / "in", ["a", "e", "i", "o"]
    records = [{"prompt": TEXTS[0], "seed": 5}, {"prompt": TEXTS[1]}, {"prompt": TEXTS[0], "seed": 5, "stop": vowels}]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    batch.run(llama, source, tmp_path / "out", logprobs=True, prompt_logprobs=True, max_gen_len=8)
    *answers, cut = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    near = rounding(llama.model)
    for text, answer in zip(TEXTS, answers, strict=True):
        whole = answer["prompt_tokens"] + answer["tokens"]
        assert text + answer["generation"] == llama.text_of(whole)
        assert answer["prompt_logprobs"][1:] + answer["logprobs"] == pytest.approx(own(whole), abs=near)
    before = answers[0]["generation"]
    at = min(before.index(vowel) for vowel in vowels if vowel in before)
    assert (cut["generation"], cut["stop_reason"]) == (before[:at], before[at])
    assert cut["tokens"] == answers[0]["tokens"][: len(cut["tokens"])] and len(cut["tokens"]) < 8
    texts = [answer["prompt_tokens"] for answer in answers]
    asked = [Request(row, "0", text, 1.0, 1.0, 0, 0, start=2) for row, text in enumerate(texts)]
    for response, text in zip(Engine(llama, RunSettings(score=True)).run(asked), texts, strict=True):
        expected = own(text)[1:]
        assert json.loads(response.json)["total"] == pytest.approx(sum(expected), abs=near * len(expected))
