"""Whole runs: what answers are, what they depend on, and the command."""

import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest

from hf_llama_sampling import batch, cli
from hf_llama_sampling.batch import Refused, runner
from hf_llama_sampling.batch.engine import Engine
from hf_llama_sampling.batch.requests import respond
from hf_llama_sampling.llama.dialog import dialog_tokens
from tests.batch.helpers import ONE_THREAD, SETTINGS, ask_all, read, some_records, write
from tests.bounds import ROUNDING


def test_an_answer_is_what_generate_gives_for_its_record_alone(llama, tmp_path):
    """Field for field: the record's settings before the run's, and the seed that the answer names."""
    records = [
        {"id": {"any": ["json"]}, "prompt": "ROMEO:"},
        {"prompt_tokens": [1, 5, 6], "temperature": 1.5, "top_p": 0.3, "max_gen_len": 4, "seed": 2**63},
        {"messages": [{"role": "user", "content": "Who goes there?"}], "id": None},
        {"prompt": "HAMLET:\nI go.", "temperature": 1, "max_gen_len": 300},
    ]
    answers = ask_all(llama, tmp_path, records)
    prompts = [llama.tokenizer.encode(record["prompt"], True, False) for record in (records[0], records[3])]
    prompts[1:1] = [[1, 5, 6], dialog_tokens(records[2]["messages"], llama.tokenizer)]
    for record, prompt, answer in zip(records, prompts, answers, strict=True):
        settings = {"temperature": 0.6, "top_p": 0.9, "max_gen_len": 12, **record}
        alone = llama.model.generate(
            [prompt], seeds=[answer["seed"]], **{k: settings[k] for k in ("temperature", "top_p", "max_gen_len")}
        )
        assert answer == {
            "id": record.get("id"),
            "generation": llama.tokenizer.decode(alone.tokens[0]),
            "tokens": alone.tokens[0],
            "finish_reason": alone.finish_reason[0],
            "seed": record.get("seed", answer["seed"]),
        }
    assert {answer["finish_reason"] for answer in answers} == {"stop", "length"}
    assert all(answer["seed"] < 2**53 for answer in answers if answer["seed"] != 2**63)


@pytest.mark.slow
def test_answers_do_not_depend_on_batches_windows_or_the_order_of_the_input(llama, tmp_path):
    """One, three or all rows a batch, any window, any order: each record's line is the same, byte for byte."""
    records = some_records(40)
    first = ask_all(llama, tmp_path, records)
    for number, options in enumerate(
        [{"batch_size": 1}, {"batch_size": 3, "window": 7}, {"batch_tokens": 100}, {"window": 1}]
    ):
        assert ask_all(llama, tmp_path, records, name=f"out{number}", **options) == first
    order = list(range(40))
    random.Random(1).shuffle(order)
    shuffled = ask_all(llama, tmp_path, [records[i] for i in order], name="shuffled")
    # Records that are equal in everything draw in the order in which they come.
    twins = [i for i, record in enumerate(records) if records.count(record) > 1]
    assert [shuffled[order.index(i)] for i in range(40) if i not in twins] == [
        first[i] for i in range(40) if i not in twins
    ]
    assert sorted(json.dumps(shuffled[order.index(i)]) for i in twins) == sorted(json.dumps(first[i]) for i in twins)


def test_logprobs_on_request(llama, tmp_path):
    """Beside each token its raw logprob and the best ids; the prompt's with its ids; as `score_tokens` gives them."""
    records = [*some_records(9), {"prompt": "say", "max_gen_len": 0}]
    plain = ask_all(llama, tmp_path, records)
    full = ask_all(llama, tmp_path, records, name="full", logprobs=True, prompt_logprobs=True, top_logprobs=2)
    bare = ask_all(llama, tmp_path, records, name="bare", logprobs=True)
    for answer, with_all, with_some in zip(plain, full, bare, strict=True):
        assert answer.items() <= with_all.items() and answer.items() <= with_some.items()
        assert with_some.keys() - answer.keys() == {"logprobs"}
        text = with_all["prompt_tokens"] + answer["tokens"]
        scored = llama.model.score_tokens([text], top_logprobs=2)
        start = len(with_all["prompt_tokens"])
        assert with_all["prompt_logprobs"] == pytest.approx(scored.logprobs[0][:start], abs=ROUNDING)
        assert with_all["logprobs"] == pytest.approx(scored.logprobs[0][start:], abs=ROUNDING)
        for found, expected in zip(with_all["top_logprobs"], scored.top_logprobs[0][start:], strict=True):
            assert [tuple(pair) for pair in found] == [pytest.approx(pair, abs=ROUNDING) for pair in expected]


def test_named_tokens_and_the_three_distributions_on_request(llama, tmp_path):
    """The run's ids or a record's own, texts or ids, beside completions or prompts; no token and no seed changes."""
    records = [{"prompt": "the king"}, {"prompt": "what shall I say"}, {"prompt": "my lord", "temperature": 0}]
    named = [records[0], {**records[1], "logprobs_of": [" king", 7]}, {**records[2], "logprobs_of": []}]
    king = 542
    rows = [[5], [king, 7], []]
    plain = ask_all(llama, tmp_path, records)
    asked = {"logprobs_of": [5], "sampling_logprobs": True}
    full = ask_all(llama, tmp_path, named, name="full", prompt_logprobs=True, **asked)
    fields = {
        "logprobs",
        "temperature_logprobs",
        "sampled_logprobs",
        "nucleus_mass",
        "prompt_tokens",
        "prompt_logprobs",
    }
    for answer, more, ids in zip(plain, full, rows, strict=True):
        assert answer.items() <= more.items()
        assert more.keys() - answer.keys() == fields | ({"logprobs_of"} if ids else set())
        assert {len(more[name]) for name in fields if not name.startswith("prompt")} == {len(answer["tokens"])}
        if ids:
            text = more["prompt_tokens"] + answer["tokens"]
            scored = llama.model.score_tokens([text], logprobs_of=ids, start=len(more["prompt_tokens"]))
            for found, expected in zip(more["logprobs_of"], scored.logprobs_of[0], strict=True):
                assert [tuple(one) for one in found] == [pytest.approx(one, abs=ROUNDING) for one in expected]
    scores = ask_all(llama, tmp_path, named, name="scores", score=True, logprobs_of=[" king"], max_gen_len=None)
    assert [[[one[0] for one in place] for place in score.get("logprobs_of", [])[1:]] for score in scores] == [
        [[king]] * (len(scores[0]["prompt_tokens"]) - 1),
        [[king, 7]] * (len(scores[1]["prompt_tokens"]) - 1),
        [],
    ]
    wrong = ask_all(
        llama,
        tmp_path,
        [{"prompt": "a", "logprobs_of": bad} for bad in ("king", [5000], ["the king"], [True])],
        name="wrong",
    )
    says = ["must be a list", "from 0 to 1023, got 5000", "texts of one token", "must be an int, got True"]
    assert [words in answer["error"] for words, answer in zip(says, wrong, strict=True)] == [True] * 4


def test_scoring_generates_nothing(llama, tmp_path):
    """A text's ids and logprobs, whatever the record says of draws; texts of one token and of full length too."""
    texts = [[1], list(range(3, 515)), [1, 5, 6]]
    records = [{"prompt_tokens": text, "temperature": 2, "max_gen_len": 3} for text in texts]
    answers = ask_all(llama, tmp_path, records, score=True, top_logprobs=1, max_gen_len=None)
    for text, answer in zip(texts, answers, strict=True):
        assert answer.keys() == {"id", "prompt_tokens", "prompt_logprobs", "total", "count", "top_logprobs"}
        assert answer["prompt_tokens"] == text and len(answer["top_logprobs"]) == len(text)
        assert answer["prompt_logprobs"] == pytest.approx(llama.model.score_tokens([text]).logprobs[0], abs=ROUNDING)
    with pytest.raises(ValueError, match="scoring generates nothing"):
        ask_all(llama, tmp_path, records, name="wrong", score=True, logprobs=True)


def test_strict_stops_at_the_first_wrong_record(llama, tmp_path):
    """It is named, there is no output, and what was answered before is kept for the mended input."""
    records = some_records(12)
    source = write(tmp_path / "in", [*records[:9], {"prompt": "a", "top_p": 9}, *records[9:]])
    run = {**SETTINGS, "strict": True, "window": 4}
    with pytest.raises(Refused, match="line 10: top_p"):
        batch.run(llama, source, tmp_path / "out", **run)
    assert not (tmp_path / "out").exists()
    write(source, records)
    with pytest.raises(Refused, match="reuse"):
        batch.run(llama, source, tmp_path / "out", **run)
    assert batch.run(llama, source, tmp_path / "out", **run, existing="reuse").answered == 4
    assert read(tmp_path / "out") == ask_all(llama, tmp_path, records, name="other")


@pytest.mark.slow
def test_memory_is_flat(llama, tmp_path, monkeypatch):
    """Of 5,000 short records no more is held than of 500, but for some 40 bytes each."""

    def echo(self, requests):
        return [respond(request, {"generation": "", "tokens": request.prompt}, 1) for request in requests]

    monkeypatch.setattr(Engine, "run", echo)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    peaks = []
    for count in (50, 500, 5_000):
        records = ({"id": i, "prompt_tokens": [1, i % 1000, i // 1000]} for i in range(count))
        source = write(tmp_path / f"in{count}", records)
        tracemalloc.start()
        batch.run(llama, source, tmp_path / f"out{count}", **SETTINGS, window=256)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert [len(read(tmp_path / f"out{count}")) for count in (500, 5_000)] == [500, 5_000]
    assert peaks[2] - peaks[1] < 4_500 * 60


def command(*arguments, llama=None):
    """`run_command`, with the arguments that the command line makes of these."""
    parsed = cli._parser().parse_args(["batch", *map(str, arguments), "--max-gen-len", "12"])
    return runner.run_command(parsed, lambda _: llama)


def test_exit_status_and_summary(llama, tmp_path, capsys):
    """0, 1 with error records, 2 where it is refused; a summary on standard error; no bar where it is no terminal."""
    source = write(tmp_path / "in", some_records(3))
    assert command(source, tmp_path / "out", llama=llama) == 0
    tokens = sum(len(answer["tokens"]) for answer in read(tmp_path / "out"))
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"3 records, 0 errors, {tokens} tokens, ")
    assert printed.err.count("\n") == 1
    assert command(source, tmp_path / "out", llama=llama) == 0
    assert capsys.readouterr().err.startswith("complete already: 3 records")
    (tmp_path / "nothing.in").touch()
    for _ in range(2):
        assert command(tmp_path / "nothing.in", tmp_path / "nothing.out", llama=llama) == 0
        assert capsys.readouterr().err.startswith("0 records, 0 errors, 0 tokens, ")
    write(source, [*some_records(3), "{bad"])
    assert command(source, tmp_path / "out", llama=llama) == 2
    assert capsys.readouterr().err.startswith("hf-llama-sampling batch: the output")
    assert command(source, tmp_path / "out", "--existing", "reuse", llama=llama) == 1
    assert "4 records (3 of them by an earlier run), 1 errors" in capsys.readouterr().err
    assert command(source, tmp_path / "new", "--strict", llama=llama) == 2
    assert "line 4: a line must hold one JSON object" in capsys.readouterr().err
    assert command(tmp_path / "none", tmp_path / "new", llama=None) == 2  # before anything is loaded
    assert command(source, "-", "--score", "--top-logprobs", 1, llama=llama) == 1
    assert capsys.readouterr().out.count("prompt_logprobs") == 3


def test_an_interrupt_keeps_what_was_answered(llama, tmp_path, monkeypatch, capsys):
    """Ctrl-C ends the command with status 130 and one sentence; the same command makes only the rest."""
    source = write(tmp_path / "in", some_records(6))
    run, calls = Engine.run, []

    def interrupted(self, requests):
        calls.append(requests)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self, requests)

    monkeypatch.setattr(Engine, "run", interrupted)
    assert command(source, tmp_path / "out", "--batch-size", 2, llama=llama) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"what was answered is kept in {tmp_path}/out.run" in error
    monkeypatch.undo()
    assert command(source, tmp_path / "out", "--batch-size", 2, llama=llama) == 0
    assert "6 records (2 of them by an earlier run)" in capsys.readouterr().err
    calls[:] = [None]
    monkeypatch.setattr(Engine, "run", interrupted)
    assert command(source, tmp_path / "new", llama=llama) == 130
    assert capsys.readouterr().err == "hf-llama-sampling batch: interrupted before the first batch was answered\n"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"logprobs": 5}, TypeError, "logprobs must be True or False, got 5: top_logprobs=5 returns the 5 best"),
        ({"logprobs": 0}, TypeError, "logprobs must be True or False, got 0"),
        ({"prompt_logprobs": "no"}, TypeError, "prompt_logprobs must be True or False, got 'no'"),
        ({"score": 1}, TypeError, "score must be True or False, got 1"),
        ({"strict": "yes"}, TypeError, "strict must be True or False, got 'yes'"),
        ({"top_logprobs": True}, TypeError, "top_logprobs must be an int, got True"),
        ({"top_logprobs": 2000}, ValueError, "top_logprobs must be from 0 to 1024"),
        ({"temperature": [0.5]}, TypeError, "temperature must be a number"),
        ({"temperature": -1}, ValueError, "temperature must be 0"),
        ({"top_p": "0.9"}, TypeError, "top_p must be a number"),
        ({"max_gen_len": 1.5}, TypeError, "max_gen_len must be an int"),
        ({"max_gen_len": -1}, ValueError, "max_gen_len must be at least 0"),
        ({"seed": "1"}, TypeError, "seed must be an int"),
        ({"seed": 2**64}, ValueError, "seed must be from 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"batch_tokens": 1.0}, TypeError, "batch_tokens must be an int"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"existing": "overwrite"}, ValueError, "existing must be one of 'check', 'reuse', 'restart'"),
        ({"prompt_field": 5}, TypeError, "prompt_field must be the name of a field"),
        ({"prompt_field": "a", "id_field": "a"}, ValueError, "must be two fields"),
        ({"keep_fields": "test"}, TypeError, "keep_fields must be True, False or a list of names"),
        ({"keep_fields": [5]}, TypeError, "keep_fields must be True, False or a list of names"),
        ({"output": None}, TypeError, "output must be a path"),
        ({"input": [{"prompt": "a"}]}, TypeError, "input must be a path"),
        ({"score": True, "logprobs": True}, ValueError, "scoring generates nothing"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused_by_name(llama, tmp_path, options, error, words):
    """Nothing stands for something else, and nothing is written."""
    source = write(tmp_path / "in", some_records(1))
    with pytest.raises(error, match=words):
        batch.run(llama, **{"input": source, "output": tmp_path / "out", **SETTINGS, **options})
    assert os.listdir(tmp_path) == ["in"]


def test_the_command_maps_and_keeps_fields(llama, tmp_path):
    """`--prompt-field`, `--id-field`, `--keep-fields` and `--keep-field` mean what `run` calls so."""
    source = write(tmp_path / "in", [{"q": "love", "nr": 5, "test": 1.50, "more": 2}])
    fields = ["--prompt-field", "q", "--id-field", "nr"]
    assert command(source, tmp_path / "all", *fields, "--keep-fields", llama=llama) == 0
    assert command(source, tmp_path / "one", *fields, "--keep-field", "test", llama=llama) == 0
    (everything,), (one,) = read(tmp_path / "all"), read(tmp_path / "one")
    assert everything == one | {"more": 2} and one["id"] == 5 and one["test"] == 1.5


@pytest.mark.launches
def test_ctrl_c_ends_the_command_in_one_sentence(llama, tmp_path):
    """SIGINT in the middle of a run: status 130, no traceback, and the same command completes the output."""
    source = write(tmp_path / "in", some_records(40))
    batch.run(llama, source, tmp_path / "whole", max_gen_len=20, batch_size=2)
    command = [sys.executable, "-m", "hf_llama_sampling", "batch", source, tmp_path / "out"]
    command += ["--max-gen-len", "20", "--batch-size", "2"]
    environment = {**os.environ, **ONE_THREAD}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as ran:
        shard = tmp_path / "out.run" / "shard-00000"
        while ran.poll() is None and not (shard.exists() and shard.stat().st_size):
            time.sleep(0.01)
        ran.send_signal(signal.SIGINT)
        out, error = ran.communicate()
    assert ran.returncode == 130 and out == ""
    assert error.count("\n") == 1 and "interrupted: what was answered is kept" in error
    assert not (tmp_path / "out").exists()
    summary = batch.run(llama, source, tmp_path / "out", max_gen_len=20, batch_size=2)
    assert 0 < summary.answered < 40
    assert filecmp.cmp(tmp_path / "out", tmp_path / "whole", shallow=False)


@pytest.mark.launches
def test_the_command_needs_no_standard_streams(tmp_path):
    """With all three closed a run from file to file is as ever, and its status tells of errors."""
    source = write(tmp_path / "in", [{"prompt": "love"}, "{bad"])
    command = f"{sys.executable} -m hf_llama_sampling batch {source} {tmp_path}/out --max-gen-len 4 <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], env={**os.environ, **ONE_THREAD}).returncode == 1
    assert [list(answer)[1] for answer in read(tmp_path / "out")] == ["generation", "error"]
