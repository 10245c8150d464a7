"""Records become requests, or errors that name the record; the index notices a changed input."""

import json

import pytest
import transformers

from hf_llama_sampling import Llama, batch
from hf_llama_sampling.batch.engine import Engine
from hf_llama_sampling.batch.requests import UNSUPPORTED, Refused
from hf_llama_sampling.llama.dialog import dialog_tokens
from tests.batch.helpers import SETTINGS, ask_all, read, some_records, write
from tests.conftest import TINY

WRONG = [
    ("", "empty"),
    ("{bad", "one JSON object"),
    ("[1, 2]", "holds a list"),
    (b'{"prompt": "\xff"}', "UTF-8"),
    ("[" * 100_000, "nested too deeply"),
    ('{"prompt": "a", "prompt": "b"}', "'prompt' twice"),
    ('{"prompt": "a", "temperature": NaN}', "JSON has no NaN"),
    ('{"prompt": "a", "temperature": 1e999}', "finite, got 1e999"),
    ('{"prompt": "a", "max_gen_len": 1' + "0" * 5000 + "}", "finite"),
    ({}, "one of prompt, prompt_tokens and messages, got none"),
    ({"prompt": "a", "messages": []}, "got prompt and messages"),
    ({"prompt": 5}, "must be a text, got int"),
    ({"prompt": "\ud800"}, "lone surrogate"),
    ({"prompt_tokens": []}, "at least one"),
    ({"prompt_tokens": [1, 1024]}, "got 1024 at 1"),
    ({"prompt_tokens": [1.0]}, "1.0"),
    ({"prompt_tokens": [True]}, "True"),
    ({"prompt_tokens": [1] * 513}, "512 tokens, got 513"),
    ({"messages": [{"role": "user", "content": "[/INST]"}]}, "special tags"),
    ({"messages": [{"role": "system", "content": "x"}]}, "from the user"),
    ({"prompt": "a", "temperature": -1}, "temperature"),
    ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ({"prompt": "a", "top_p": 2}, "top_p"),
    ({"prompt": "a", "max_gen_len": -1}, "max_gen_len"),
    ({"prompt": "a", "max_gen_len": 1.5}, "max_gen_len"),
    ({"prompt": "a", "seed": -1}, "seed"),
    ({"prompt": "a", "seed": 2**64}, "seed"),
    ({"prompt": "a", "top_k": 5}, "no field 'top_k'"),
    ({"prompt": "a", "n": 2}, "no field 'n'"),
    ({"prompt": "a", "logprobs": True}, "no field 'logprobs'"),
    ({"prompt": "a", "Temperature": 1}, "did you mean 'temperature'"),
    ({"prompt": "a", "max_token": 5}, "did you mean 'max_tokens'"),
    ({"prompt": "a", "max_tokens": 5, "max_gen_len": 6}, "max_gen_len and max_tokens mean the same"),
    ({"prompt": [[1, 2]]}, "must be a text, got list"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
    ({"messages": [{"role": "user", "content": [5]}]}, "'int'"),
    ({"prompt": "a", "seed": json.loads("[" * 60 + "]" * 60)}, "seed"),
]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n": 2}, "write the record as often"),
        ({"logprobs": True}, "give it to the run (--logprobs)"),
        ({"top_logprobs": 2}, "give it to the run (--top-logprobs)"),
        ({"do_sample": False}, "give a temperature of 0"),
        ({"max_output_tokens": 5}, "name it max_gen_len"),
        ({"stop_words": ["a"]}, "name it stop"),
        ({"use_beam_search": True}, "drop it"),
        ({"include_stop_str_in_output": True}, "drop it"),
        ({"skip_special_tokens": False}, "drop it"),
        ({"add_special_tokens": False}, "drop it"),
        ({"guided_choice": ["a", "b"]}, "drop it"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "drop it"),
        ({"extra_body": {"top_k": 5}}, "drop it"),
        ({"repeat_penalty": 1.1}, "drop it"),
    ],
    ids=str,
)
def test_settings_of_other_programs_are_refused_with_the_way_out(llama, tmp_path, given, words):
    """They would change the answer; null, and values that ask for nothing, do not."""
    (name,) = given
    nothing = [{"prompt": "a", name: value} for value in (None, *UNSUPPORTED[name])]
    *answers, wrong = ask_all(llama, tmp_path, [*nothing, {"prompt": "a", **given}], max_gen_len=1)
    assert f"a record has no field {name!r} here" in wrong["error"] and f": {words}" in wrong["error"]
    assert not any("error" in answer for answer in answers)


def test_a_record_may_ask_for_what_the_run_returns(llama, tmp_path):
    """As requests to servers do: logprobs and the best tokens beside answers, an echoed prompt to be scored."""
    asked = [{"prompt": "a", "logprobs": True, "top_logprobs": 2}, {"prompt": "a", "logprobs": 3}]
    first, second = ask_all(llama, tmp_path, asked, max_gen_len=1, logprobs=True, top_logprobs=2)
    assert len(first["top_logprobs"][0]) == 2 and "give it to the run" in second["error"]
    echoed = [{"prompt": "the king", "echo": True, "logprobs": 0, "max_tokens": 0}]
    (scored,) = ask_all(llama, tmp_path, echoed, name="scored", score=True)
    assert scored["count"] == 2


def test_wrong_records_become_error_records_and_the_rest_goes_on(llama, tmp_path, caplog):
    """Each says why, at its place, with its line and id, and is logged once; the others are as if alone."""
    right = some_records(len(WRONG))
    wrong = [{**record, "id": i} if isinstance(record, dict) else record for i, (record, _) in enumerate(WRONG)]
    mixed = [record for pair in zip(wrong, right, strict=True) for record in pair]
    answers = ask_all(llama, tmp_path, mixed, window=10)
    assert answers[1::2] == ask_all(llama, tmp_path, right, name="alone")
    for i, ((record, reason), answer) in enumerate(zip(WRONG, answers[::2], strict=True)):
        assert answer.keys() == {"id", "error", "line"} and answer["line"] == 2 * i + 1
        assert reason in answer["error"]
        assert answer["id"] == (i if isinstance(record, dict) else None)
    logged = [record.getMessage() for record in caplog.records]
    assert logged == [f"line {answer['line']}: {answer['error']}" for answer in answers[::2]]


def test_null_fields_and_a_byte_order_mark_say_nothing(llama, tmp_path):
    """What other programs write beside a record changes nothing."""
    lines = [b'\xef\xbb\xbf{"prompt": "love"}\r', b'{"prompt": "lord", "messages": null, "top_p": null}']
    plain = [{"prompt": "love"}, {"prompt": "lord"}]
    assert ask_all(llama, tmp_path, lines) == ask_all(llama, tmp_path, plain, name="plain")


def test_messages_take_the_tokenizers_own_format_if_it_has_one(tiny_model, tmp_path):
    """A chat template is used where there is one; what it refuses is an error record."""
    llama = Llama(tiny_model, str(TINY))
    llama.tokenizer.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "<{{ m.role }}> {{ m.content }}{% endfor %}"
    )
    dialogs = [[{"role": "user", "content": "[INST] is text here"}], [{"role": "tool", "content": "x"}], "hello", []]
    answers = ask_all(llama, tmp_path, [{"messages": dialog} for dialog in dialogs], prompt_logprobs=True)
    text = llama.tokenizer.encode("<user> [INST] is text here", False, False)
    assert answers[0]["prompt_tokens"] == text
    assert "no tools" in answers[1]["error"]
    assert all("messages must be a list" in answer["error"] for answer in answers[2:])


def test_golden_model_needs_no_tokenizer_of_its_own(golden_model, tmp_path):
    """Anything with Meta's five members is a tokenizer; without a BOS none is put before a text."""

    class Letters:
        n_words, bos_id, eos_id, pad_id = 26, -1, -1, -1

        def encode(self, s, bos, eos):
            assert not bos and not eos
            return [ord(letter) - 97 for letter in s if "a" <= letter <= "z"]

        def decode(self, ids):
            return "".join(chr(97 + token % 26) for token in ids)

    answers = ask_all(Llama(golden_model, Letters()), tmp_path, [{"prompt": "abc"}, {"prompt": "123"}])
    assert len(answers[0]["tokens"]) == 12 and answers[0]["finish_reason"] == "length"
    assert "error" in answers[1]


def test_seeds_come_from_the_run_and_the_record(llama, tmp_path):
    """Equal records draw apart, a record's own seed wins, spelling plays no part, and the run's seed does."""
    records = ['{"prompt": "love", "top_p": 1}'] * 3 + ['{"top_p":1,   "prompt":"lov\\u0065", "id": null}']
    records += ['{"prompt": "love", "seed": 7}'] * 2
    answers = ask_all(llama, tmp_path, records, temperature=1.5)
    seeds = [answer["seed"] for answer in answers]
    assert len(set(seeds[:4])) == 4 and seeds[4:] == [7, 7]
    assert len({tuple(answer["tokens"]) for answer in answers[:4]}) == 4
    assert answers[4] == answers[5]
    alone = ask_all(llama, tmp_path, records[3:4], name="alone", temperature=1.5)
    assert alone == answers[:1]
    other = ask_all(llama, tmp_path, records, name="other", temperature=1.5, seed=4)
    assert not set(seeds[:4]) & {answer["seed"] for answer in other} and other[4:] == answers[4:]


def test_an_input_that_changes_meanwhile_is_noticed(llama, tmp_path, monkeypatch):
    """Lines added during the run are not mixed in."""
    source = write(tmp_path / "in", some_records(4))
    answer = Engine.run

    def grow(self, requests):
        with open(source, "a") as file:
            file.write('{"prompt": "late"}\n')
        return answer(self, requests)

    monkeypatch.setattr(Engine, "run", grow)
    with pytest.raises(ValueError, match="changed during the run"):
        batch.run(llama, source, tmp_path / "out", **SETTINGS, window=2)


# Fields as they lie around

AS_THEY_LIE = [
    ({"task_id": "HumanEval/0", "prompt": "love", "test": "def check(): pass", "entry_point": "f"}, '"HumanEval/0"'),
    ({"prompt": "love", "max_tokens": 3, "uuid": 7}, "7"),
    ({"prompt": "love", "max_new_tokens": 3}, "null"),
    ({"prompt": "love", "max_completion_tokens": 3, "max_gen_len": 3, "id": 0}, "0"),
    ({"prompt": [1, 5, 6], "question_id": "q", "top_k": 0, "n": 1, "stream": False, "stop": []}, '"q"'),
    ({"prompt": [{"role": "user", "content": "Hi"}], "id": False}, "false"),
    (
        {
            "custom_id": "request-1",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0},
        },
        '"request-1"',
    ),
]


def test_records_as_other_programs_write_them_are_answered(llama, tmp_path, caplog):
    """HumanEval's, OpenAI's, and settings' other names; the id by its usual names; unused fields are told once."""
    source = write(tmp_path / "in", [record for record, _ in AS_THEY_LIE])
    summary = batch.run(llama, source, tmp_path / "out", **SETTINGS)
    assert summary.errors == 0
    lines = (tmp_path / "out").read_text().splitlines()
    for line, (record, identity) in zip(lines, AS_THEY_LIE, strict=True):
        assert line.startswith(f'{{"id": {identity}, "generation": ')
        body = record.get("body", record)
        most = next((body[name] for name in body if name.startswith("max_")), 12)
        assert len(json.loads(line)["tokens"]) <= most
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "fields that play no part: 'entry_point', 'method', 'model', 'test', 'url' (keep_fields copies them)"
    )


def test_empty_lines_at_the_end_are_no_records(llama, tmp_path):
    """However many, with blanks or carriage returns; between records they are errors, so that lines still agree."""
    records = ['{"prompt": "love"}', "", '{"prompt": "lord"}']
    for number, end in enumerate([[], [""], ["", "  ", b"\r"]]):
        answers = ask_all(llama, tmp_path, [*records, *end], name=f"out{number}")
        assert len(answers) == 3 and "error" in answers[1]
    assert ask_all(llama, tmp_path, ["", ""], name="none") == []


def test_an_empty_prompt_is_answered_as_by_text_completion(llama, tmp_path):
    """It is the BOS alone, as in the reference, beside any other prompt."""
    empty, other = ask_all(llama, tmp_path, [{"prompt": ""}, {"prompt": "love"}], temperature=0, prompt_logprobs=True)
    assert empty["prompt_tokens"] == [llama.tokenizer.bos_id] and len(other["prompt_tokens"]) > 1
    (expected,) = llama.text_completion([""], temperature=0, max_gen_len=len(empty["tokens"]), continuing=True)
    assert empty["generation"] == expected["generation"]


def test_contents_may_be_lists_of_text_parts(llama, tmp_path):
    """Their texts, line by line, are the message."""
    parts = [{"type": "text", "text": "Who goes"}, {"type": "text", "text": "there?"}]
    records = [{"messages": [{"role": "user", "content": content}]} for content in (parts, ["Who goes", "there?"])]
    answers = ask_all(llama, tmp_path, records, prompt_logprobs=True)
    expected = dialog_tokens([{"role": "user", "content": "Who goes\nthere?"}], llama.tokenizer)
    assert [answer["prompt_tokens"] for answer in answers] == [expected, expected]


SPELLED = [
    "1e-400",
    "1.0",
    "1",
    "-0.0",
    "1e999",
    "9" * 5000,
    '"\\u00e9\\/"',
    '"é"',
    '[1.50, {"b": 2,  "a": []}]',
    "false",
]


def test_ids_and_kept_fields_come_back_as_they_were_spelled(llama, tmp_path):
    """Character by character, in answers and in errors, also those that Python reads as something else."""
    deep = "[" * 2000 + "]" * 2000
    texts = [*SPELLED, deep, '"\\ud800"']
    lines = [f'{{"id": {text}, "prompt": "love", "extra": {text}}}' for text in texts]
    lines += [f'{{"id": {text}, "prompt": "love", "top_p": 9}}' for text in texts]
    source = write(tmp_path / "in", lines)
    summary = batch.run(llama, source, tmp_path / "out", **SETTINGS, keep_fields=True)
    assert summary.errors == len(texts)
    answers = (tmp_path / "out").read_text().splitlines()
    for text, answer, error in zip(texts, answers[: len(texts)], answers[len(texts) :], strict=True):
        assert answer.startswith(f'{{"id": {text}, "generation"') and answer.endswith(f', "extra": {text}}}')
        assert error.startswith(f'{{"id": {text}, "error": "top_p')
    # Taken up, reused and merged again, they are the same.
    before = (tmp_path / "out").read_bytes()
    write(source, [*lines, '{"prompt": "more"}'])
    again = batch.run(llama, source, tmp_path / "out", **SETTINGS, keep_fields=True, existing="reuse")
    assert (again.records, again.answered) == (len(lines) + 1, len(texts) + 1)
    assert (tmp_path / "out").read_bytes().startswith(before)


def test_ids_that_python_takes_for_equal_are_different_records(llama, tmp_path):
    """`reuse` after 1 became 1.0, and 1e-400 became 0.0, makes these answers again."""
    ask_all(llama, tmp_path, ['{"id": 1, "prompt": "love"}', '{"id": 1e-400, "prompt": "love"}'])
    changed = ['{"id": 1.0, "prompt": "love"}', '{"id": 0.0, "prompt": "love"}']
    summary = batch.run(llama, write(tmp_path / "in", changed), tmp_path / "out", **SETTINGS, existing="reuse")
    assert summary.answered == 2
    assert [line[:10] for line in (tmp_path / "out").read_text().splitlines()] == ['{"id": 1.0', '{"id": 0.0']


BROKEN = [
    '{"id": 7, "prompt": "a"',
    '{"id": 7, "prompt": "a}',
    '{"prompt": "a" "id": 7}',
    '{"prompt": bad, "id": 7}',
    '{"prompt": "a, "id": 7}',
    '{"id": 7, "prompt": "a", "temperature": NaN}',
    '{"id": 7, "prompt": "a", "prompt": "b"}',
    '{"prompt": ' + "[" * 5000 + "]" * 5000 + ', "id": 7}',
    '{"id": 7, "prompt": "a"} {"id": 8}',
    b'{"prompt": "\xff", "id": 7}',
    '{"meta": {"id": 5}, "id": 7}',
    "{'id': 1, \"id\": 7}",
    '{"task_id": 7, "id": null, "prompt": 5}',
]


def test_an_error_names_the_lines_id_whatever_is_wrong_with_the_line(llama, tmp_path):
    """Cut off, badly quoted, not UTF-8, nested too deeply: the id that a reader sees there; else null."""
    answers = ask_all(llama, tmp_path, BROKEN)
    assert all("error" in answer and answer["id"] == 7 for answer in answers)
    nothing = ['{"prompt": "\\"id\\": 7', '{"meta": {"id": 5}, "prompt": 5}', '[{"id": 3}]', '{"id": NaN}', '{"id": }']
    answers = ask_all(llama, tmp_path, nothing, name="nothing")
    assert all("error" in answer and answer["id"] is None for answer in answers)


def test_fields_may_have_names_of_their_own(llama, tmp_path):
    """The prompt as text, ids or messages under another name; `prompt` and `id` are data then."""
    records = [
        {"question": "love", "nr": 5, "id": "x", "prompt": 3},
        {"question": [1, 5, 6], "nr": 6},
        {"question": [{"role": "user", "content": "Hi"}], "nr": 7},
        {"prompt": "love", "nr": 8},
    ]
    answers = ask_all(llama, tmp_path, records, prompt_field="question", id_field="nr", prompt_logprobs=True)
    assert [answer["id"] for answer in answers] == [5, 6, 7, 8]
    assert answers[0]["prompt_tokens"] == llama.tokenizer.encode("love", True, False)
    assert answers[1]["prompt_tokens"] == [1, 5, 6]
    assert answers[2]["prompt_tokens"] == dialog_tokens(records[2]["question"], llama.tokenizer)
    assert "must hold 'question', got none" in answers[3]["error"]


def test_fields_are_kept_on_request(llama, tmp_path):
    """All that no rule names, or those named; never in place of a field of the answer."""
    record = {"task_id": 1, "prompt": "love", "test": [1, {"a": None}], "entry_point": "f", "speed": 2.50}
    (plain,) = ask_all(llama, tmp_path, [record], name="plain")
    (kept,) = ask_all(llama, tmp_path, [record], name="all", keep_fields=True)
    assert kept == plain | {"test": [1, {"a": None}], "entry_point": "f", "speed": 2.5}
    (kept,) = ask_all(llama, tmp_path, [record], name="some", keep_fields=["test", "task_id"])
    assert kept == plain | {"test": [1, {"a": None}], "task_id": 1}
    typed = [{"prompt": "love", "top_k": 5}, {"prompt": "love", "tokens": 5}]
    answers = ask_all(llama, tmp_path, typed, name="typed", keep_fields=["top_k"])
    assert answers[0]["top_k"] == 5 and answers[0]["id"] is None and "error" not in answers[1]
    (answer,) = ask_all(llama, tmp_path, typed[1:], name="taken", keep_fields=True)
    assert "'tokens' is" in answer["error"]


@pytest.mark.parametrize("bos", ["<s>", "</s>", None])
def test_prompts_are_the_same_as_at_the_other_entrances(tiny_model, tmp_path, bos):
    """With a BOS, with one that is the EOS too, with none; with control tokens spelled out: as `text_completion`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.bos_token = bos
    llama = Llama(tiny_model, tokenizer)
    texts = ["the king", "say </s> and <s>", "O"]
    answers = ask_all(llama, tmp_path, [{"prompt": text} for text in texts], temperature=0.0, prompt_logprobs=True)
    completions = llama.text_completion(texts, 0.0, max_gen_len=12, logprobs=True, continuing=True)
    for text, answer, completion in zip(texts, answers, completions, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert answer["prompt_tokens"] == [tokenizer.bos_token_id] * (bos is not None) + ids
        assert answer["generation"] == completion["generation"]


def test_an_input_that_is_not_utf8_is_refused_as_a_whole(llama, tmp_path):
    """One sentence, instead of an error for each line."""
    (tmp_path / "in").write_bytes('{"prompt": "love"}\n'.encode("utf-16"))
    with pytest.raises(Refused, match="must be UTF-8, and its first bytes say UTF-16"):
        batch.run(llama, tmp_path / "in", tmp_path / "out", **SETTINGS)


def test_infinite_logprobs_become_null(llama, tmp_path, monkeypatch):
    """JSON has no infinity, and a masked token's logprob is one: the answer is not lost for it."""
    scored = llama.model.score_tokens

    def masked(prompts, **settings):
        output = scored(prompts, **settings)
        output.logprobs[0][-1] = -float("inf")
        return output

    monkeypatch.setattr(llama.model, "score_tokens", masked, raising=False)
    (answer,) = ask_all(llama, tmp_path, [{"prompt_tokens": [1, 5]}], score=True)
    assert answer["prompt_logprobs"] == [0.0, None]
    assert read(tmp_path / "out") == [answer]


def test_a_record_that_needs_a_token_which_the_model_lacks_is_refused_alone(tiny_model, tmp_path):
    """A tokenizer may have more tokens than the model: their texts become error records, the others are answered."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["Verona"])
    records = [{"prompt": "ROMEO:"}, {"prompt": "in Verona"}, {"messages": [{"role": "user", "content": "Verona?"}]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    batch.run(
        Llama(tiny_model, tokenizer, max_seq_len=64), tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_gen_len=2
    )
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ["error" in answer for answer in answers] == [False, True, True]
    assert all("1024" in answer["error"] for answer in answers[1:])
