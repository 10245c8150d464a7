"""Streams at the `llama`-compatible API and in the command, against the predictions of the same calls."""

import json

import pytest

from hf_llama_sampling import Llama, Tokenizer
from hf_llama_sampling.cli import main
from tests.conftest import TINY

SCORES = {  # of events, and of predictions
    "logprob": "logprobs",
    "logprobs_of": "logprobs_of",
    "temperature_logprob": "temperature_logprobs",
    "sampled_logprob": "sampled_logprobs",
    "nucleus_mass": "nucleus_mass",
}
PROMPTS = ["ROMEO:", "The king is", "JULIET:\nO"]


@pytest.fixture(params=["sentencepiece", "transformers"])
def llama(request, tiny_model):
    sentencepiece = request.param == "sentencepiece"
    return Llama(tiny_model, Tokenizer(TINY / "tokenizer.model") if sentencepiece else str(TINY), max_seq_len=128)


def text_of(events, row):
    """A row's texts together."""
    return "".join(event.text for event in events if event.row == row)


@pytest.mark.parametrize(
    "more", [{}, {"echo": True}, {"continuing": True, "stop": [["e"], None, ["\n", "o"]]}, {"stop": " "}], ids=str
)
def test_events_are_the_predictions(llama, more):
    """Texts, tokens, logprobs and reasons of `text_completion`."""
    asked = {"max_gen_len": 10, "seeds": 4, "logprobs_of": [" king", 5], "sampling_logprobs": True, **more}
    answers = llama.text_completion(PROMPTS, **asked)
    events = list(llama.stream_completion(PROMPTS, **asked, top_logprobs=1))
    for row, answer in enumerate(answers):
        assert text_of(events, row) == answer["generation"]
        tokens = [event for event in events if event.row == row and event.id is not None]
        assert [llama.text_of([event.id]) for event in tokens] == answer["tokens"]
        for field, name in SCORES.items():
            assert [getattr(event, field) for event in tokens] == answer[name]
        (end,) = [event for event in events if event.row == row and event.id is None]
        assert end.stop_reason == answer.get("stop_reason")
        assert all(event.top == [] or event.top[0][1] >= event.logprob for event in tokens)


def test_dialogs_stream_too(llama):
    """As `chat_completion`; a dialog with LLAMA2's tags is refused by its place."""
    dialogs = [[{"role": "user", "content": text}] for text in ("Speak, Romeo", "Who is there?")]
    asked = {"max_gen_len": 8, "seeds": 3, "stop": ["e"], "logprobs_of": [[13], [" king"]], "sampling_logprobs": True}
    answers = llama.chat_completion(dialogs, **asked)
    events = list(llama.stream_chat(dialogs, **asked))
    assert [text_of(events, row) for row in (0, 1)] == [answer["generation"]["content"] for answer in answers]
    for row, answer in enumerate(answers):
        tokens = [event for event in events if event.row == row and event.id is not None]
        for field, name in SCORES.items():
            assert [getattr(event, field) for event in tokens] == answer[name]
    with pytest.raises(ValueError, match="dialog 1 does"):
        llama.stream_chat([dialogs[0], [{"role": "user", "content": "[INST]"}]])


def test_wrong_calls_are_refused_at_once(llama):
    """What can be checked without the model is, before anything is asked for."""
    llama.max_batch_size = 1
    for wrong, words in (({"stop": ""}, "an empty one"), ({"prompts": ["a", "b"]}, "max_batch_size=1")):
        with pytest.raises(ValueError, match=words):
            llama.stream_completion(**{"prompts": ["a"], "max_gen_len": 2, **wrong})
    with pytest.raises(TypeError, match="logprobs"):
        llama.stream_completion(["a"], logprobs=5)


def test_the_command_streams_text_and_events(capsys):
    """`complete --stream`: the same text as without; with --json a line for each event of all prompts."""
    command = ["complete", "The king is", "--temperature", "0", "--max-gen-len", "6"]
    assert main([*command, "--stop", "l"]) == 0
    plain = capsys.readouterr().out
    assert main([*command, "--stop", "l", "--stream"]) == 0
    assert capsys.readouterr().out == plain == " we\n"
    scores = ["--logprobs", "--logprobs-of", " king", "--sampling-logprobs"]
    assert main(["complete", "ROMEO:", *command[1:], "--stream", "--json", *scores]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main(["complete", "ROMEO:", *command[1:], "--json", *scores]) == 0
    for row, answer in enumerate(map(json.loads, capsys.readouterr().out.splitlines())):
        own = [event for event in events if event["row"] == row]
        assert "".join(event["text"] for event in own) == answer["generation"]
        for field, name in SCORES.items():
            assert [event[field] for event in own[:-1]] == answer[name] and field not in own[-1]
        assert own[-1]["id"] is None and own[-1]["finish_reason"] in ("stop", "length")
    for more in (["ROMEO:"], ["--logprobs"], ["--logprobs-of", "5"], ["--sampling-logprobs"]):
        assert main(["complete", *more, *command[1:], "--stream"]) == 2
        assert "add --json" in capsys.readouterr().err
