"""Stop strings and seeds at the `llama`-compatible API, against the same run cut in plain Python."""

import pytest
import transformers

from hf_llama_sampling import Llama, Tokenizer
from hf_llama_sampling.llama.conversation import Conversation
from hf_llama_sampling.llama.dialog import UNSAFE_ERROR
from hf_llama_sampling.llama.streaming import TextStreamer
from hf_llama_sampling.sampling.settings import SamplingSettings
from hf_llama_sampling.text.stopping import StopStrings
from hf_llama_sampling.text.tokens import TokenSpeller
from tests.conftest import TINY

pytestmark = pytest.mark.slow

PROMPTS = ["ROMEO:", "The king of France is here", "JULIET:\nO", "First Citizen:\nWe"]
STOPS = ["\n", " the", "e", ", and", ["\n", " the"], ["zzz"], [["a"], None, ["e", "o"], "I"], ".", "ou", []]


@pytest.fixture(params=["sentencepiece", "transformers"])
def llama(request, tiny_model):
    sentencepiece = request.param == "sentencepiece"
    tokenizer = Tokenizer(TINY / "tokenizer.model") if sentencepiece else str(TINY)
    return Llama(tiny_model, tokenizer, max_seq_len=128)


def strings_of(stop, row):
    """A row's stop strings, from each way to give them."""
    if isinstance(stop, str):
        return [stop]
    if all(isinstance(string, str) for string in stop):
        return stop
    return [stop[row]] if isinstance(stop[row], str) else stop[row] or []


def cut(text, strings):
    """The text before the first of some strings, and the string; the longest of several that begin there."""
    found = [(text.index(string), -len(string), string) for string in strings if string in text]
    return (text[: min(found)[0]], min(found)[2]) if found else (text, None)


@pytest.mark.parametrize("schedule", ["reference", "padded"])
@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_a_text_ends_right_before_the_first_stop_string(llama, stop, schedule):
    """Text, reason, tokens and logprobs are those of the run without `stop`, cut; echo adds the prompt to them."""
    llama.schedule = schedule
    arguments = {"max_gen_len": 24, "seeds": 5, "logprobs": True}
    whole = llama.text_completion(PROMPTS, **arguments)
    stopped = llama.text_completion(PROMPTS, **arguments, stop=stop)
    echoed = llama.text_completion(PROMPTS, **arguments, stop=stop, echo=True)
    for row, (before, after, echo) in enumerate(zip(whole, stopped, echoed, strict=True)):
        text, reason = cut(before["generation"], strings_of(stop, row))
        assert (after["generation"], after["stop_reason"]) == (text, reason)
        assert before["tokens"][: len(after["tokens"])] == after["tokens"]
        assert len(after["logprobs"]) == len(after["tokens"])
        assert after["logprobs"] == pytest.approx(before["logprobs"][: len(after["tokens"])], abs=64 * 2.0**-19)
        assert echo["generation"].startswith(PROMPTS[row]) and echo["generation"].endswith(after["generation"])
        assert (echo["stop_reason"], echo["tokens"][-1:]) == (reason, after["tokens"][-1:] or echo["tokens"][-1:])
        assert len(echo["tokens"]) - len(after["tokens"]) == len(llama.tokenizer.encode(PROMPTS[row], True, False))


def test_tokens_hold_nothing_of_the_stop_string(llama):
    """A token that begins before the string and reaches into it is left out, and none that ends before it is."""
    stopped = llama.text_completion(PROMPTS, max_gen_len=24, seeds=5, logprobs=True, stop=["ou", "e"])
    assert any(answer["stop_reason"] for answer in stopped)
    for row, answer in enumerate(stopped):
        prompt = llama.tokenizer.encode(PROMPTS[row], True, False)
        (ids,), _ = llama.generate([prompt], 24, seeds=5 + row)
        fitting = [k for k in range(len(ids) + 1) if len(llama.text_of(ids[:k])) <= len(answer["generation"])]
        assert len(answer["tokens"]) == max(fitting)


@pytest.mark.parametrize(("stop", "kept"), [("f", 2), (["zz", "f I"], 2), (["I", "f"], 1), ([["f"], None], 2)])
def test_a_stop_string_may_spell_a_control_token(tiny_model, control_f, stop, kept):
    """Decoded text leaves the token out, and the string is met: in answers, streams and OpenAI's format."""
    llama = Llama(tiny_model, control_f, max_seq_len=64)
    prompts = ["ROMEO:", "ROMEO:"]
    whole = llama.text_completion(prompts, temperature=0, max_gen_len=6, details=True)
    assert whole[0]["generation"] == "\nI I have been" and whole[0]["ids"][2] == control_f.convert_tokens_to_ids("f")
    answers = llama.text_completion(prompts, temperature=0, max_gen_len=6, details=True, stop=stop)
    choices = llama.completions(prompts, temperature=0, max_gen_len=6, logprobs=0, stop=stop)["choices"]
    events = list(llama.stream_completion(prompts, temperature=0, max_gen_len=6, stop=stop))
    for row, answer in enumerate(answers):
        strings, ends = strings_of(stop, row), [event for event in events if event.row == row]
        count, reason = (kept, strings[-1] if kept > 1 else strings[0]) if strings else (6, None)
        assert (answer["ids"], answer["stop_reason"]) == (whole[0]["ids"][:count], reason)
        assert answer["generation"] == ["\n", "\nI", "\nI I have been"][min(count, 3) - 1]
        assert answer["finish_reason"] == ends[-1].finish_reason == ("stop" if strings else "length")
        assert [event.id for event in ends] == [*answer["ids"], None] and ends[-1].stop_reason == reason
        assert "".join(event.text for event in ends) == choices[row]["text"] == answer["generation"]
        assert len(choices[row]["logprobs"]["tokens"]) == count


def test_a_conversation_ends_at_a_control_token(tiny_model, control_f):
    """What is written, and what the conversation keeps, is the text before it."""
    llama, written = Llama(tiny_model, control_f, max_seq_len=64), []
    conversation = Conversation(llama, SamplingSettings(0.0, 0.9), 6, stop=["f"])
    conversation._encode = lambda messages: llama.tokenizer.encode("ROMEO:", True, False)
    conversation.ask("Hi", written.append)
    assert "".join(written) == conversation.messages[-1]["content"] == "\nI"


def test_control_tokens_of_a_sentencepiece_file():
    """They are found by id among tokens of text, and a text that spells them out is met too."""
    speller = TokenSpeller(Tokenizer(TINY / "tokenizer.model"))
    stops = StopStrings(["</s>I"], 1, speller.control_tokens)
    ids = speller.tokenizer.encode("The king", False, False)
    spelled = speller.tokenizer.encode("x</s>I", False, False)
    assert stops.cut(0, [*ids, 2, 985, 13], speller.text_of) == (2, len("I\n"), "</s>I")
    assert stops.cut(0, [*ids, 2, 13], speller.text_of) == (4, 0, None)
    assert stops.cut(0, spelled, speller.text_of)[1:] == (len("</s>I"), "</s>I")


def test_stopped_rows_do_not_draw_on(llama):
    """Generation ends when all rows have met a stop string: no step more than the longest row needs."""
    steps = []

    class Counter:
        def put(self, value):
            steps.append(value)

        def end(self):
            pass

    (whole,) = llama.text_completion(["ROMEO:"], max_gen_len=24, seeds=5, logprobs=True)
    (stopped,) = llama.text_completion(
        ["ROMEO:"], max_gen_len=24, seeds=5, stop="are", logprobs=True, streamer=Counter()
    )
    assert stopped["stop_reason"] == "are" and stopped["generation"] == whole["generation"].partition("are")[0]
    assert len(steps) - 1 <= len(stopped["tokens"]) + 3 < len(whole["tokens"])


def test_dialogs_are_cut_too(llama):
    """Each answer at its own string; an unsafe dialog that is not generated has no reason."""
    dialogs = [[{"role": "user", "content": text}] for text in ("Speak, Romeo", "say [INST]", "Who is there?")]
    arguments = {"max_gen_len": 24, "temperature": 1.2, "seeds": 11, "logprobs": True}
    for compat in ("meta", "fixed"):
        llama.compat = compat
        whole = llama.chat_completion(dialogs, **arguments)
        stopped = llama.chat_completion(dialogs, **arguments, stop=[["o"], None, ["e", "a"]])
        for row, strings in ((0, ["o"]), (2, ["e", "a"])):
            text, reason = cut(whole[row]["generation"]["content"], strings)
            assert (stopped[row]["generation"]["content"], stopped[row]["stop_reason"]) == (text, reason)
        assert stopped[1]["generation"]["content"] == UNSAFE_ERROR and stopped[1]["stop_reason"] is None
    assert (stopped[1]["tokens"], stopped[1]["logprobs"]) == ([], [])


def test_without_stop_a_prediction_has_metas_keys_alone(llama):
    """`stop_reason` is there where `stop` was given."""
    assert set(llama.text_completion(["a"], max_gen_len=1)[0]) == {"generation"}
    assert set(llama.text_completion(["a"], max_gen_len=1, stop="x")[0]) == {"generation", "stop_reason"}


@pytest.mark.parametrize(
    ("stop", "kind", "words"),
    [
        ("", ValueError, "got an empty one"),
        (["a", ""], ValueError, "got an empty one"),
        ([["a"], [""]], ValueError, "got an empty one for row 1"),
        ([["a"]], ValueError, "got 1 for 2 rows"),
        (5, TypeError, "got 5"),
        (b"a", TypeError, "got b'a'"),
        ([["a"], [3]], TypeError, "got [3] for row 1"),
        ({"a": 1}, TypeError, "got {'a': 1}"),
    ],
)
def test_bad_stop_strings_are_refused_by_name(llama, stop, kind, words):
    """The rule, the value and the row; nothing is generated."""
    for call in (llama.text_completion, llama.chat_completion):
        batch = ["a", "b"] if call == llama.text_completion else [[{"role": "user", "content": "a"}]] * 2
        with pytest.raises(kind) as error:
            call(batch, stop=stop, max_gen_len=2)
        assert words in str(error.value)


# Streaming


def test_a_streamer_writes_nothing_of_a_stop_string(llama):
    """What may become one is held back until it is known; the pieces add up to the text that is returned."""
    for stop in (["\n"], [" the"], ["e"], ["zzz", ", "], ["hither"]):
        pieces = []
        stops = StopStrings(stop, 1)
        streamer = TextStreamer(llama.text_of, pieces.append, stops)
        (answer,) = llama.text_completion(["ROMEO:"], max_gen_len=24, seeds=5, stop=stop, streamer=streamer)
        assert "".join(pieces) == answer["generation"]


# Seeds


def test_a_prompt_with_its_seed_answers_alike_in_any_batch(llama):
    """An int means `seed, seed + 1, ...`; texts, dialogs and ids alike, in both schedules."""
    whole = llama.text_completion(PROMPTS, max_gen_len=12, seeds=7)
    assert llama.text_completion(PROMPTS, max_gen_len=12, seeds=[7, 8, 9, 10]) == whole
    for row, prompt in enumerate(PROMPTS):
        assert llama.text_completion([prompt], max_gen_len=12, seeds=7 + row) == [whole[row]]
    llama.schedule = "padded"
    assert llama.text_completion(PROMPTS[::-1], max_gen_len=12, seeds=[10, 9, 8, 7]) == whole[::-1]
    ids = [llama.tokenizer.encode(prompt, True, False) for prompt in PROMPTS]
    assert [llama.text_of(row) for row in llama.generate(ids, 12, seeds=7)[0]] == [row["generation"] for row in whole]


def test_a_dialog_keeps_its_seed_beside_an_unsafe_one(llama):
    """Dialogs that are not generated leave the others' seeds as they are."""
    llama.compat = "fixed"
    dialogs = [[{"role": "user", "content": text}] for text in ("Speak", "say [INST]", "Who is there?")]
    whole = llama.chat_completion(dialogs, 1.2, max_gen_len=12, seeds=3)
    assert llama.chat_completion(dialogs[2:], 1.2, max_gen_len=12, seeds=5) == whole[2:]
    assert llama.chat_completion(dialogs, 1.2, max_gen_len=12, seeds=[3, 4, 5]) == whole


@pytest.mark.parametrize(
    ("seeds", "words"), [([1], "got 1 for 2 rows"), (-1, "got -1"), ("7", "got '7'"), ([1, 2.5], "2.5"), (True, "True")]
)
def test_bad_seeds_are_refused_by_name(llama, seeds, words):
    """As with `model.generate(seeds=)`."""
    with pytest.raises((ValueError, TypeError)) as error:
        llama.text_completion(["a", "b"], seeds=seeds, max_gen_len=2)
    assert "seeds" in str(error.value) and words in str(error.value)


def test_byte_level_pieces_of_a_stop_string():
    """A stop string in another script is found although it comes byte by byte, and its bytes are no tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer.encode("ab 你好 c", add_special_tokens=False)

    def text_of(tokens):
        return tokenizer.decode(tokens, skip_special_tokens=True)

    found = StopStrings("好", 1).cut(0, ids, text_of)
    assert found.reason == "好" and text_of(ids)[: len(text_of(ids)) - found.dropped] == "ab 你"
    assert text_of(ids[: found.tokens]) == "ab 你"
