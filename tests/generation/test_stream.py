"""`model.stream`: events of a batch, against the same call of `generate` and plain decoding."""

import gc
import threading

import pytest
import torch

from hf_llama_sampling import TokenEvent
from hf_llama_sampling.text.tokens import TokenSpeller
from tests.generation.helpers import RAGGED, SHORT

pytestmark = pytest.mark.slow

ASKED = {"max_gen_len": 8, "seeds": 5, "temperature": 0.9, "logprobs": True, "top_logprobs": 2}


@pytest.fixture
def prompts(tiny_tokenizer):
    """Ragged prompts, one ending within a character."""
    texts = ["ROMEO:", "The king of 你", "JULIET:\nO", "First Citizen:\nWe are 😀 "]
    ids = [tiny_tokenizer(text).input_ids for text in texts]
    ids[1].pop()
    return ids


def by_row(events):
    """Each row's tokens' events, and its last one; nothing comes after that."""
    rows = {}
    for event in events:
        assert isinstance(event, TokenEvent)
        tokens, ends = rows.setdefault(event.row, ([], []))
        assert not ends and (event.id is None) == (event.finish_reason is not None)
        (ends if event.id is None else tokens).append(event)
    return {row: (tokens, end) for row, (tokens, (end,)) in rows.items()}


def scores_beside(out, row, asked):
    """The scores of a row's events, a list for each field, from `generate`'s output; None for those not asked for."""
    drawn = bool(asked.get("sampling_logprobs"))
    fields = {
        "logprob": out.logprobs if asked.get("logprobs") or drawn else None,
        "top": out.top_logprobs if asked.get("top_logprobs") else None,
        "logprobs_of": out.logprobs_of if asked.get("logprobs_of") else None,
        "temperature_logprob": out.temperature_logprobs if drawn else None,
        "sampled_logprob": out.sampled_logprobs if drawn else None,
        "nucleus_mass": out.nucleus_mass if drawn else None,
    }
    return {name: [None] * len(out.tokens[row]) if lists is None else lists[row] for name, lists in fields.items()}


def cut(text, strings):
    """The text before the first of some strings, and the string; the longest of several that begin there."""
    found = [(text.index(string), -len(string), string) for string in strings if string in text]
    return (text[: min(found)[0]], min(found)[2]) if found else (text, None)


@pytest.mark.parametrize(
    "more",
    [
        {"schedule": "reference"},
        {"echo": True, "schedule": "reference"},
        {"echo": True},
        {"echo": True, "compat": "meta", "eos_token_id": [2, 980, 275, 328]},
        {"max_gen_len": [0, 6, 3, 5], "echo": True, "top_logprobs": 0},
        {"max_gen_len": 0, "echo": True},
        {"seeds": None, "eos_token_id": [13, 980, 275, 328], "schedule": "reference"},
        {"seeds": None, "eos_token_id": [13, 980, 275, 328]},
        {"num_return_sequences": 2, "logprobs": False},
        {"logprobs_of": [5, 13], "sampling_logprobs": True, "logprobs": False, "top_logprobs": 0},
        {"logprobs_of": [[5], [], [7, 13, 2], [7]], "sampling_logprobs": True, "echo": True, "schedule": "reference"},
        {"logprobs_of": [[5], [], [7, 13, 2], [7]], "echo": True, "temperature": [0, 0.9, 0.5, 0]},
        {"logprobs_of": [[5], [], [7, 13, 2], [7]], "sampling_logprobs": True, "echo": True, "max_gen_len": 0},
        {"sampling_logprobs": True, "seeds": None, "eos_token_id": [13, 980, 275, 328]},
    ],
    ids=str,
)
def test_events_are_what_generate_returns(tiny_model, tiny_tokenizer, prompts, more):
    """Tokens, all scores and reasons, and texts that add up to the decoded whole."""
    asked = {**ASKED, "max_gen_len": 6, "schedule": "padded", **more}
    torch.manual_seed(0)
    out = tiny_model.generate(prompts, return_dict_in_generate=True, **asked)
    torch.manual_seed(0)
    rows = by_row(tiny_model.stream(prompts, tokenizer=tiny_tokenizer, **asked))
    text_of = TokenSpeller(tiny_tokenizer).text_of
    assert sorted(rows) == list(range(len(out.tokens)))
    for row, (tokens, end) in rows.items():
        prompt = prompts[row // asked.get("num_return_sequences", 1)]
        assert [event.id for event in tokens] == out.tokens[row]
        assert end.finish_reason == out.finish_reason[row]
        for name, expected in scores_beside(out, row, asked).items():
            assert [getattr(event, name) for event in tokens] == expected, name
            assert getattr(end, name) is None
        text = "".join(event.text for event in [*tokens, end])
        if asked.get("echo"):
            assert text == text_of(out.tokens[row])
        else:
            assert text_of(prompt).rstrip("\ufffd") + text == text_of(prompt + out.tokens[row])


@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_stop_strings_end_rows_and_nothing_of_them_comes(tiny_model, tiny_tokenizer, prompts, schedule):
    """One list for all rows or one per row, as `stop` or `stop_strings`: the texts of the run without them, cut."""
    asked = {**ASKED, "max_gen_len": 16, "schedule": schedule, "logprobs_of": [13], "sampling_logprobs": True}
    whole = by_row(tiny_model.stream(prompts, tokenizer=tiny_tokenizer, **asked))
    for stop in (["e", "\n"], [["ou", "o"], None, "e", [" ", "the"]], "th"):
        strings = [[stop]] * 4 if isinstance(stop, str) else stop if isinstance(stop[1], list | None) else [stop] * 4
        rows = by_row(tiny_model.stream(prompts, tokenizer=tiny_tokenizer, stop_strings=stop, **asked))
        for row, (tokens, end) in rows.items():
            before = "".join(event.text for event in [*whole[row][0], whole[row][1]])
            own = strings[row] or []
            text, string = cut(before, [own] if isinstance(own, str) else own)
            assert "".join(event.text for event in [*tokens, end]) == text and end.stop_reason == string
            kept = whole[row][0][: len(tokens)]
            # Texts differ in when they come, tokens and scores in nothing.
            assert [event._replace(text="") for event in tokens] == [event._replace(text="") for event in kept]
            assert end.finish_reason == ("stop" if string else whole[row][1].finish_reason)


def test_tokens_come_one_step_at_a_time_and_closing_ends_the_run(tiny_model, tiny_tokenizer):
    """No step runs before it is asked for; after closing, or losing, the iterator no thread is left."""
    steps = []
    counted = {
        "max_gen_len": 8,
        "seeds": 1,
        "eos_token_id": [],
        "logits_processor": [lambda ids, s: steps.append(1) or s],
    }
    threads = threading.active_count()
    unused = tiny_model.stream([SHORT], **counted)
    assert (threading.active_count(), steps) == (threads, [])
    for end in ("close", "forget", "break"):
        steps.clear()
        events = tiny_model.stream([SHORT], tokenizer=tiny_tokenizer, **counted)
        for taken, event in enumerate(events, 1):
            assert (event.row, len(steps)) == (0, taken)
            if taken == 3:
                break
        if end == "close":
            events.close()
        else:
            del events
        gc.collect()
        assert (threading.active_count(), len(steps)) == (threads, 3)
        assert len(tiny_model.generate([SHORT], max_gen_len=4, seeds=1, eos_token_id=[]).tokens[0]) == 4
    assert len([event for event in unused if event.id is not None]) == 8


def test_errors_come_through(tiny_model, tiny_tokenizer):
    """Of the call, of a step, of the caller's own code; in the consumer's thread, and no thread is left."""

    def broken(ids, scores):
        if ids.shape[1] == len(SHORT) + 2:
            raise OSError("disk full")
        return scores

    threads = threading.active_count()
    events = tiny_model.stream([SHORT], max_gen_len=8, seeds=1, eos_token_id=[], logits_processor=[broken])
    assert [next(events).id, next(events).id] == tiny_model.generate([SHORT], max_gen_len=2, seeds=1).tokens[0]
    with pytest.raises(OSError, match="disk full"):
        next(events)
    assert list(events) == []
    for wrong, error, words in (
        ({"temperature": -1}, ValueError, "temperature"),
        ({"stop": ""}, ValueError, "got an empty one"),
        ({"stop": [["a"], ["b"]]}, ValueError, "got 2 for 1 rows"),
        ({"temprature": 1}, TypeError, "temprature"),
    ):
        with pytest.raises(error, match=words):
            next(tiny_model.stream([SHORT], tokenizer=tiny_tokenizer, max_gen_len=2, **wrong))
    assert threading.active_count() == threads
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        tiny_model.stream([SHORT], max_gen_len=2, stop="a")
    with pytest.raises(ValueError, match="takes no streamer"):
        tiny_model.stream([SHORT], max_gen_len=2, streamer=object())


def test_the_consumers_autocast_is_the_runs(tiny_model):
    """What torch keeps per thread goes with the call."""
    asked = {"max_gen_len": 3, "temperature": 0, "logprobs": True}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = tiny_model.generate(RAGGED, **asked)
        events = list(tiny_model.stream(RAGGED, **asked))
    assert expected.logprobs != tiny_model.generate(RAGGED, **asked).logprobs
    for row, (tokens, _) in by_row(events).items():
        assert [event.logprob for event in tokens] == expected.logprobs[row]
