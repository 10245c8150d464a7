"""Token texts and OpenAI's completions format, against plain decoding and lm-evaluation-harness' own parser."""

import json

import pytest

from hf_llama_sampling import Llama, Tokenizer
from hf_llama_sampling.text.tokens import TokenSpeller
from tests.conftest import TINY

TEXTS = ["The king is 你好 here", "ROMEO:\nI", "a"]


@pytest.fixture(params=["sentencepiece", "transformers"])
def tokenizer(request, tiny_tokenizer):
    return Tokenizer(TINY / "tokenizer.model") if request.param == "sentencepiece" else tiny_tokenizer


@pytest.fixture
def prompts(tiny_tokenizer):
    return [tiny_tokenizer(text).input_ids for text in TEXTS]


def check(choice, logprobs, tops, first):
    """Tokens add up to the text at their offsets, and scores stand beside them; the first of them is null."""
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert all(
        choice["text"].startswith(token, at) for token, at in zip(found["tokens"], found["text_offset"], strict=True)
    )
    assert found["token_logprobs"] == [*[None] * first, *logprobs[first:]]
    assert found["top_logprobs"][:first] == [None] * first
    for own, best, names in zip(logprobs[first:], tops[first:], found["top_logprobs"][first:], strict=True):
        assert max(names.values()) == best[0][1] and own in names.values() and len(names) in (1, 2, 3)
    assert len(found["bytes"]) == len(found["tokens"])


@pytest.mark.parametrize("echo", [True, False])
def test_generates_output_in_the_completions_format(tiny_model, tokenizer, prompts, echo):
    """With echo the whole text, whose first token has null; without, what follows the prompt."""
    asked = {"max_gen_len": 6, "seeds": 3, "logprobs": True, "top_logprobs": 2, "echo": echo}
    out = tiny_model.generate(prompts, **asked)
    answer = out.to_openai(tokenizer, model="tiny")
    speller = TokenSpeller(tokenizer)
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    for row, choice in enumerate(answer["choices"]):
        whole = out.tokens[row] if echo else prompts[row] + out.tokens[row]
        assert choice["text"] == speller.text_of(whole)[0 if echo else len(TEXTS[row]) :]
        assert (choice["index"], choice["finish_reason"]) == (row, out.finish_reason[row])
        check(choice, out.logprobs[row], out.top_logprobs[row], int(echo))
        texts = out.token_texts(tokenizer)[row]
        assert [*map(list, texts.bytes)] == choice["logprobs"]["bytes"] and texts.text == choice["text"]
    made = sum(map(len, out.tokens)) - echo * sum(map(len, prompts))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts)) and answer["usage"]["completion_tokens"] == made


def test_scored_texts_in_the_completions_format(tiny_model, tokenizer, prompts):
    """Whole texts, spans, and texts after a BOS, whose first token has a logprob."""
    for more, starts in (({}, [0, 0, 0]), ({"start": [3, 1, 0]}, [3, 1, 0]), ({"bos": True}, [0, 0, 0])):
        scored = tiny_model.score_tokens(prompts, top_logprobs=2, **more)
        answer = scored.to_openai(tokenizer)
        for row, (choice, start) in enumerate(zip(answer["choices"], starts, strict=True)):
            first = int(start == 0 and "bos" not in more)
            check(choice, scored.logprobs[row], scored.top_logprobs[row], first)
            speller = TokenSpeller(tokenizer)
            assert choice["text"] == TEXTS[row][len(speller.text_of(prompts[row][:start])) :]


def test_the_harness_own_parser_takes_it(tiny_model, tokenizer, prompts):
    """Sums and greediness of `score_continuations`, out of an echoed answer with one new token, as it asks servers."""
    parser = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    greedy = tiny_model.generate(prompts, max_gen_len=3, temperature=0).tokens
    texts = [prompt + tokens for prompt, tokens in zip(prompts, greedy, strict=True)] + [prompts[0]]
    contexts = [len(prompt) for prompt in prompts] + [3]
    out = tiny_model.generate(
        texts, max_gen_len=1, temperature=0, echo=True, logprobs=True, top_logprobs=1, eos_token_id=[]
    )
    parsed = parser.parse_logprobs(out.to_openai(tokenizer), tokens=texts, ctxlens=contexts)
    parts = zip(texts, contexts, strict=True)
    scored = [tiny_model.score_continuations([text[:at]], [[text[at:]]]) for text, at in parts]
    assert [total for total, _ in parsed] == pytest.approx([one.totals[0][0] for one in scored], abs=1e-3)
    assert [flag for _, flag in parsed] == [one.is_greedy[0][0] for one in scored]
    assert {flag for _, flag in parsed} == {True, False}
    assert parser.parse_generations(out.to_openai(tokenizer))[1].startswith(TEXTS[1])


def test_without_logprobs_and_with_the_best_alone(tiny_model, tokenizer, prompts):
    """No logprobs asked for, none given; the best tokens without the tokens' own are refused."""
    out = tiny_model.generate(prompts, max_gen_len=2, temperature=0)
    assert [choice["logprobs"] for choice in out.to_openai(tokenizer)["choices"]] == [None] * 3
    with pytest.raises(ValueError, match="call with logprobs=True"):
        tiny_model.generate(prompts, max_gen_len=2, top_logprobs=1).to_openai(tokenizer)


def test_best_tokens_of_one_text_stay_apart(tiny_model, tokenizer, prompts):
    """A SentencePiece vocabulary spells a letter by a piece and by a byte: the less probable one is named by its id."""
    out = tiny_model.generate(prompts, max_gen_len=1, temperature=0, logprobs=True, top_logprobs=1024)
    for choice, ((best, *_),) in zip(
        out.to_openai(tokenizer)["choices"], zip(out.top_logprobs, strict=True), strict=True
    ):
        (names,) = choice["logprobs"]["top_logprobs"]
        assert [*names.values()] == [value for _, value in best] and len(names) == 1024
        ids = [id for (id, _), name in zip(best, names, strict=True) if name == f"token_id:{id}"]
        assert ids and len({name for name in names if not name.startswith("token_id:")}) == 1024 - len(ids)


def test_what_cannot_be_has_the_apis_own_least_logprob(tiny_model, tokenizer):
    """JSON has no infinity: tokens that a processor forbids, among the best ones, have -9999.0."""
    allowed = [13, 985]
    asked = {"max_gen_len": 2, "temperature": 0, "logprobs": True, "top_logprobs": 4}
    out = tiny_model.generate([[1, 367]], **asked, prefix_allowed_tokens_fn=lambda row, ids: allowed)
    assert {value for _, value in out.top_logprobs[0][0][2:]} == {-float("inf")}
    answer = json.loads(json.dumps(out.to_openai(tokenizer), allow_nan=False))
    found = answer["choices"][0]["logprobs"]
    assert [sorted(names.values())[:2] for names in found["top_logprobs"]] == [[-9999.0, -9999.0]] * 2
    assert found["token_logprobs"] == out.logprobs[0]


def test_the_llama_compatible_api_gives_it_too(tiny_model, tokenizer):
    """`completions`: `text_completion`'s texts, cut at stop strings with their tokens."""
    llama = Llama(tiny_model, tokenizer, max_seq_len=64)
    asked = {"max_gen_len": 8, "seeds": 5, "stop": [["e"], None, ["\n", "o"]]}
    answers = llama.text_completion(TEXTS, **asked, logprobs=True, continuing=True)
    choices = llama.completions(TEXTS, **asked, logprobs=2)["choices"]
    for answer, choice in zip(answers, choices, strict=True):
        assert (choice["text"], choice["stop_reason"]) == (answer["generation"], answer["stop_reason"])
        found = choice["logprobs"]
        assert found["token_logprobs"] == pytest.approx(answer["logprobs"], abs=64 * 2.0**-19)
        assert answer["generation"].startswith("".join(found["tokens"]))
        assert len(found["top_logprobs"]) == len(found["text_offset"]) == len(found["bytes"]) == len(answer["tokens"])
        assert choice["finish_reason"] == ("stop" if answer["stop_reason"] else "length")
    echoed = llama.completions(TEXTS, max_gen_len=0, echo=True, logprobs=0)["choices"]
    assert [choice["text"] for choice in echoed] == TEXTS
    assert all(choice["logprobs"]["token_logprobs"][0] is None for choice in echoed)
