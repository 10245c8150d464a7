"""Stop strings of batch records, and texts that go on from their prompts, against the same run cut in plain Python."""

import json

import pytest

from hf_llama_sampling import Llama, Tokenizer, batch
from hf_llama_sampling.cli import main
from tests.batch.helpers import SETTINGS, ask_all, write
from tests.conftest import TINY

PROMPTS = ["ROMEO:", "The king of France is here", "JULIET:\nO", "First Citizen:\nWe are", "the king", "ROMEO:"]
OWN = [
    {},
    {"stop": "e"},
    {"stop_strings": ["ou", "you"]},
    {"stop": []},
    {"stop_sequences": ["\n", " "]},
    {"stop": ["R"]},
]
LONG = {"max_gen_len": 24, "temperature": 0.9}


def cut(text, strings):
    """The text before the first of some strings, and the string; the longest of several that begin there."""
    found = [(text.index(string), -len(string), string) for string in strings if string in text]
    return (text[: min(found)[0]], min(found)[2]) if found else (text, None)


@pytest.mark.parametrize("options", [{}, {"prompt_logprobs": True, "stop": ["the", ","]}], ids=["own", "and the run's"])
def test_answers_are_cut_right_before_each_records_own_strings(llama, tmp_path, options):
    """Text, reason, tokens and what stands beside them are those of the run without strings, cut."""
    asked = {**LONG, "logprobs": True, "top_logprobs": 2, "batch_size": 4}
    plain = [{"prompt": prompt, "id": i} for i, prompt in enumerate(PROMPTS)]
    records = [{**record, **own} for record, own in zip(plain, OWN, strict=True)]
    whole = ask_all(llama, tmp_path, plain, name="whole", **asked)
    stopped = ask_all(llama, tmp_path, records, **asked, **options)
    for before, after, own, record in zip(whole, stopped, OWN, plain, strict=True):
        strings = next(iter(own.values()), options.get("stop", []))
        text, reason = cut(before["generation"], [strings] if isinstance(strings, str) else strings)
        assert (after["generation"], after.get("stop_reason")) == (text, reason)
        assert ("stop_reason" in after) is bool(strings) and after["seed"] == before["seed"]
        assert after["finish_reason"] == ("stop" if reason else before["finish_reason"])
        count = len(after["tokens"])
        assert after["tokens"] == before["tokens"][:count]
        assert after["logprobs"] == pytest.approx(before["logprobs"][:count], abs=64 * 2.0**-19)
        assert [[id for id, _ in best] for best in after["top_logprobs"]] == [
            [id for id, _ in best] for best in before["top_logprobs"][:count]
        ]
        prompt = llama.tokenizer.encode(record["prompt"], True, False)
        ends = [len(llama.text_of(prompt + before["tokens"][:k])) - len(record["prompt"]) for k in range(25)]
        assert count == (max(k for k, end in enumerate(ends) if end <= len(text)) if reason else len(before["tokens"]))
    assert sum(after.get("stop_reason") is not None for after in stopped) >= 2


def test_a_string_may_spell_a_control_token(tiny_model, control_f, tmp_path):
    """Of a record, though decoded text leaves the token out; its neighbours go on."""
    records = [{"prompt": "ROMEO:", "stop": "f"}, {"prompt": "ROMEO:"}, {"prompt": "ROMEO:", "stop": ["zz", "f I"]}]
    answers = ask_all(Llama(tiny_model, control_f), tmp_path, records, temperature=0, max_gen_len=6)
    assert [answer["generation"] for answer in answers] == ["\nI", "\nI I have been", "\nI"]
    assert [answer.get("stop_reason") for answer in answers] == ["f", None, "f I"]
    assert len(answers[0]["tokens"]) == len(answers[2]["tokens"]) == 2


def test_a_string_in_the_prompt_alone_ends_nothing_and_one_at_the_first_token_ends_at_once(llama, tmp_path):
    """The completion counts; a string may begin with the space that it begins with."""
    records = [{"prompt": "The king is", "stop": "The king is"}, {"prompt": "The king is", "stop": " "}]
    free, at_once = ask_all(llama, tmp_path, records, temperature=0, max_gen_len=8)
    assert (free["generation"], free["stop_reason"]) == (" well.", None)
    assert (at_once["generation"], at_once["tokens"], at_once["finish_reason"]) == ("", [], "stop")


@pytest.mark.parametrize("kind", ["sentencepiece", "transformers"])
def test_prompt_and_generation_are_the_decoded_whole(tiny_model, tmp_path, kind):
    """Of texts and of ids, the space included that a completion begins with; of a dialog it is a message."""
    llama = Llama(tiny_model, Tokenizer(TINY / "tokenizer.model") if kind == "sentencepiece" else str(TINY))
    ids = llama.tokenizer.encode("the king is 你", True, False)
    records = [{"prompt": text} for text in (*PROMPTS[:4], " a", "你好")]
    records += [{"prompt_tokens": ids}, {"prompt_tokens": ids[:-1]}, {"prompt_tokens": [1]}]
    answers = ask_all(llama, tmp_path, records, temperature=0.9)
    for record, answer in zip(records, answers, strict=True):
        prompt = record.get("prompt_tokens") or llama.tokenizer.encode(record["prompt"], True, False)
        before = llama.text_of(prompt).rstrip("\ufffd")
        assert before + answer["generation"] == llama.text_of(prompt + answer["tokens"])
    assert any(answer["generation"].startswith(" ") for answer in answers)
    dialog = {"messages": [{"role": "user", "content": "Who is there?"}]}
    (message,) = ask_all(llama, tmp_path, [dialog], name="dialog")
    assert message["generation"] == llama.text_of(message["tokens"])


def test_the_command_takes_strings_for_all(tmp_path, capsys):
    """As `batch.run(stop=)`; a run with other strings is another run."""
    source = write(tmp_path / "in.jsonl", [{"prompt": "ROMEO:"}, {"prompt": "the king", "stop": ["zzz"]}])
    command = ["batch", str(source), str(tmp_path / "out.jsonl"), "--temperature", "0", "--max-gen-len", "8"]
    assert main([*command, "--stop", "e", "--stop", "o"]) == 0
    first, second = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert first["stop_reason"] in ("e", "o") and not set("eo") & set(first["generation"])
    assert second["stop_reason"] is None
    capsys.readouterr()
    assert main([*command, "--stop", "e"]) == 2
    assert "stop" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"stop": ""}, "got an empty one"),
        ({"stop": ["a", ""]}, "got an empty one"),
        ({"stop": 5}, "got 5"),
        ({"stop": [["a"]]}, "got [['a']]"),
        ({"stop": "a", "stop_strings": "b"}, "stop and stop_strings mean the same and differ"),
    ],
)
def test_bad_strings_are_refused_by_name(llama, tmp_path, record, words):
    """In a record they cost that record; in the call, the run."""
    (answer,) = ask_all(llama, tmp_path, [{"prompt": "a", **record}])
    assert words in answer["error"]
    if len(record) == 1:
        with pytest.raises((ValueError, TypeError)) as error:
            batch.run(llama, tmp_path / "out.in", tmp_path / "other", **SETTINGS, **record)
        assert words in str(error.value)
    assert ask_all(llama, tmp_path, [{"prompt": "a", "stop": "x", "stop_strings": ["x"]}], name="same")[0]["tokens"]
