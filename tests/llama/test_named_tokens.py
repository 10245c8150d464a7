"""Named tokens and the three distributions at the `llama`-compatible API, as `model.generate` gives them."""

import pytest

from hf_llama_sampling import Llama, Tokenizer
from hf_llama_sampling.llama.dialog import UNSAFE_ERROR
from hf_llama_sampling.llama.named_tokens import named_ids
from tests.bounds import ROUNDING
from tests.conftest import TINY

PROMPTS = ["ROMEO:", "The king of France is here", "JULIET:\nO"]
KING = 542  # " king"
SAMPLING = ["logprobs", "temperature_logprobs", "sampled_logprobs", "nucleus_mass"]


@pytest.fixture(scope="module", params=["sentencepiece", "transformers"])
def llama(request, tiny_model):
    tokenizer = Tokenizer(TINY / "tokenizer.model") if request.param == "sentencepiece" else str(TINY)
    return Llama(tiny_model, tokenizer, max_seq_len=128)


def flat(values):
    """Numbers of lists in lists, in order."""
    return [number for value in values for number in flat(value)] if isinstance(values, (list, tuple)) else [values]


def alone(llama, prompt, seed, **asked):
    """The engine's answer to one prompt."""
    ids = llama.tokenizer.encode(prompt, bos=True, eos=False)
    return llama.model.generate([ids], max_gen_len=6, seeds=[seed], max_seq_len=128, **asked)


@pytest.mark.parametrize("echo", [False, True])
def test_predictions_hold_what_was_asked_for_beside_their_tokens(llama, echo):
    """Each field as the engine gives it for the prompt alone, ids and texts alike, one list or one per prompt."""
    given, rows = ([5, " king"], [[5, KING]] * 3) if echo else ([[" king"], [], [7, 5]], [[KING], [], [7, 5]])
    answers = llama.text_completion(
        PROMPTS, max_gen_len=6, seeds=4, echo=echo, logprobs_of=given, sampling_logprobs=True
    )
    for row, (prompt, answer, ids) in enumerate(zip(PROMPTS, answers, rows, strict=True)):
        assert answer.keys() == {"generation", "tokens", "logprobs_of", *SAMPLING}
        own = alone(llama, prompt, 4 + row, echo=echo, logprobs_of=[ids or [5]], sampling_logprobs=True)
        assert len(answer["tokens"]) == len(own.tokens[0])
        for name in SAMPLING:
            assert answer[name] == pytest.approx(getattr(own, name)[0], abs=2 * ROUNDING)
        if ids:
            assert flat(answer["logprobs_of"]) == pytest.approx(flat(own.logprobs_of[0]), abs=ROUNDING)
        else:
            assert answer["logprobs_of"] == [[]] * len(own.tokens[0])


def test_details_are_those_of_the_completions_format(llama):
    """Ids, bytes and reasons beside tokens and best tokens, as `completions` gives them, cut at stop strings alike."""
    asked = {"max_gen_len": 12, "seeds": 4, "stop": [["e"], None, " zz"]}
    answers = llama.text_completion(PROMPTS, **asked, continuing=True, details=True, logprobs=True, top_logprobs=2)
    choices = llama.completions(PROMPTS, **asked, logprobs=2)["choices"]
    assert {answer["finish_reason"] for answer in answers} == {"stop", "length"}
    for answer, choice in zip(answers, choices, strict=True):
        assert (answer["generation"], answer["finish_reason"]) == (choice["text"], choice["finish_reason"])
        assert (answer["bytes"], answer["logprobs"]) == (
            choice["logprobs"]["bytes"],
            choice["logprobs"]["token_logprobs"],
        )
        assert [llama.text_of([token]) for token in answer["ids"]] == answer["tokens"]
        for place, best in enumerate(answer["top_logprobs"]):
            named = {llama.speller.name_of(token): value for token, value in best}
            assert named.items() <= choice["logprobs"]["top_logprobs"][place].items() and len(best) == 2
    (bare,) = llama.text_completion(PROMPTS[:1], max_gen_len=4, seeds=4, details=True)
    assert bare.keys() == {"generation", "tokens", "ids", "bytes", "finish_reason"}


def test_best_tokens_and_details_of_dialogs(tiny_model):
    """As the engine gives them for the same prompt; what is not generated has none."""
    llama = Llama(tiny_model, str(TINY), max_seq_len=128, compat="fixed")
    dialogs = [[{"role": "user", "content": text}] for text in ("Hi", "[INST]")]
    one, unsafe = llama.chat_completion(
        dialogs, max_gen_len=4, seeds=1, chat_format="llama2", top_logprobs=3, details=True
    )
    ids = llama.encode_dialog(dialogs[0], "llama2")
    own = llama.model.generate([ids], max_gen_len=4, seeds=[1], max_seq_len=128, top_logprobs=3, logprobs=True)
    assert (one["ids"], one["finish_reason"]) == (own.tokens[0], own.finish_reason[0])
    assert flat(one["top_logprobs"]) == pytest.approx(flat(own.top_logprobs[0]), abs=ROUNDING)
    assert one.keys() == unsafe.keys() and unsafe["finish_reason"] is None
    assert all(unsafe[name] == [] for name in ("tokens", "ids", "bytes", "top_logprobs"))


def test_generate_adds_a_dict(llama):
    """Its two answers stay as they are, and what was asked for comes third."""
    ids = [llama.tokenizer.encode(prompt, bos=True, eos=False) for prompt in PROMPTS]
    plain = llama.generate(ids, 8, seeds=2, logprobs=True)
    assert len(plain) == 2
    tokens, logprobs, more = llama.generate(ids, 8, seeds=2, logprobs_of=[" king"])
    assert (tokens, logprobs, list(more)) == (plain[0], None, ["logprobs_of"])
    tokens, logprobs, more = llama.generate(ids, 8, seeds=2, sampling_logprobs=True)
    assert (tokens, logprobs, list(more)) == (*plain, SAMPLING[1:])
    tokens, logprobs, more = llama.generate(ids, 8, seeds=2, top_logprobs=1, details=True)
    assert (tokens, logprobs, list(more)) == (plain[0], None, ["top_logprobs", "finish_reason"])
    assert [len(row) for row in more["top_logprobs"]] == [len(row) for row in tokens]
    assert more["finish_reason"] == ["length" if len(row) == 8 else "stop" for row in tokens]


def test_stop_strings_cut_every_field_alike(llama):
    """As many entries as tokens before the string, which some row has."""
    asked = {"max_gen_len": 16, "seeds": 5, "logprobs_of": [5], "sampling_logprobs": True}
    whole, stopped = llama.text_completion(PROMPTS, **asked), llama.text_completion(PROMPTS, **asked, stop=["e"])
    assert any(len(after["tokens"]) < len(before["tokens"]) for before, after in zip(whole, stopped, strict=True))
    for before, after in zip(whole, stopped, strict=True):
        kept = len(after["tokens"])
        for name in ("logprobs_of", *SAMPLING):
            assert flat(after[name]) == pytest.approx(flat(before[name][:kept]), abs=2 * ROUNDING)


def test_an_unsafe_dialog_has_empty_fields(tiny_model):
    """With `compat="fixed"` it is not generated; the others keep their own ids."""
    llama = Llama(tiny_model, str(TINY), max_seq_len=128, compat="fixed")
    dialogs = [[{"role": "user", "content": text}] for text in ("Hi", "[INST]", "Who is there?")]
    answers = llama.chat_completion(
        dialogs, max_gen_len=4, seeds=1, chat_format="llama2", logprobs_of=[[5], [6], [7]], sampling_logprobs=True
    )
    assert answers[1]["generation"]["content"] == UNSAFE_ERROR
    assert all(answers[1][name] == [] for name in ("tokens", "logprobs_of", *SAMPLING))
    for row, token in ((0, 5), (2, 7)):
        assert [place[0][0] for place in answers[row]["logprobs_of"]] == [token] * len(answers[row]["tokens"])


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([" the king of"], ValueError, "texts of one token, and ' the king of' makes 3: give an id"),
        (["king"], ValueError, "and 'king' makes 2: give ' king', which is one"),
        ([[5], ["", 6]], ValueError, "'' makes 0 for row 1: give an id"),
        ([], ValueError, "must name at least one token, got none"),
        ("king", TypeError, "must be a list of token ids or texts of one token"),
        ([[5]], ValueError, "one value or one per row, got 1 for 2 rows"),
    ],
)
def test_what_names_no_token_is_refused(llama, given, error, words):
    """With the text, what it makes, and the way out."""
    with pytest.raises(error) as refusal:
        named_ids(given, 2, llama.tokenizer)
    assert words in str(refusal.value)


def test_a_text_is_the_token_that_stands_within_a_text(llama):
    """With its space or without, or a line's end, whatever the tokenizer puts before a whole text."""
    before, within = (llama.tokenizer.encode(text, bos=False, eos=False) for text in ("Yes\n", "Yes\nI the\n"))
    assert within[: len(before)] == before
    (ids,) = named_ids(["I", " the", "\n"], 1, llama.tokenizer)
    assert ids == within[len(before) :]
