"""Batch runs: the same answers however they are cut, dealt out, killed and taken up. See also `batch_processes.py`."""

import filecmp
import io
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_llama_sampling import Llama, LlamaForCausalLM, cli
from hf_llama_sampling.batch import Refused
from hf_llama_sampling.batch import runner as batch
from hf_llama_sampling.batch import store as answers
from hf_llama_sampling.batch.runner import Answer, Question
from hf_llama_sampling.llama.dialog import dialog_tokens
from tests.bounds import ROUNDING
from tests.conftest import HERE, TINY

# What launched processes get: one thread each, and the packages that this process has.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, sys.path)])}
SETTINGS = {"max_gen_len": 12, "seed": 3}
WORDS = ["the", "king", "and", "queen", "of", "love", "to", "thee", "my", "lord", "what", "shall", "I", "say"]


@pytest.fixture(scope="module")
def llama():
    """The bundled model; nothing in a batch run needs torch's global generator."""
    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    return Llama(model, str(TINY))


@pytest.fixture(scope="module")
def launch():
    """`launch(count=2, input=..., output=..., options=...)`: a run on so many processes of one thread each."""
    environment = {**os.environ, **ONE_THREAD, "TOKENIZERS_PARALLELISM": "0"}
    command = [sys.executable, str(HERE / "batch" / "processes.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:

        def ask(**task):
            server.stdin.write(json.dumps(task, default=str) + "\n")
            server.stdin.flush()
            return SimpleNamespace(**json.loads(server.stdout.readline()))

        yield ask
        server.stdin.close()


def write(path, records):
    """Records as JSONL; strings and bytes stand for themselves."""
    lines = [record if isinstance(record, (str, bytes)) else json.dumps(record) for record in records]
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def some_records(count, seed=0):
    """Prompts of all lengths, some with settings of their own, some equal."""
    rng = random.Random(seed)
    records = []
    for i in range(count):
        record = {"prompt": " ".join(rng.choices(WORDS, k=rng.choice([1, 3, 10, 30])))}
        record |= {"id": f"r{i}"} if i % 3 == 0 else {}
        record |= {"temperature": 0} if i % 7 == 0 else {}
        record |= {"seed": i} if i % 11 == 0 else {}
        record |= {"max_gen_len": 5, "top_p": 0.5} if i % 13 == 0 else {}
        records.append(record if i % 10 else {"prompt": "the king"})
    return records


def ask_all(llama, folder, records, name="out", **options):
    """The answers to records."""
    batch.run(llama, write(folder / f"{name}.in", records), folder / name, **{**SETTINGS, **options})
    return read(folder / name)


# Answers


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


def test_scoring_generates_nothing(llama, tmp_path):
    """A text's ids and logprobs, whatever the record says of draws; texts of one token and of full length too."""
    texts = [[1], list(range(3, 515)), [1, 5, 6]]
    records = [{"prompt_tokens": text, "temperature": 2, "max_gen_len": 3} for text in texts]
    answers = ask_all(llama, tmp_path, records, score=True, top_logprobs=1, max_gen_len=None)
    for text, answer in zip(texts, answers, strict=True):
        assert answer.keys() == {"id", "prompt_tokens", "prompt_logprobs", "top_logprobs"}
        assert answer["prompt_tokens"] == text and len(answer["top_logprobs"]) == len(text)
        assert answer["prompt_logprobs"] == pytest.approx(llama.model.score_tokens([text]).logprobs[0], abs=ROUNDING)
    with pytest.raises(ValueError, match="scoring generates nothing"):
        ask_all(llama, tmp_path, records, name="wrong", score=True, logprobs=True)


def test_messages_take_the_tokenizers_own_format_if_it_has_one(tmp_path):
    """A chat template is used where there is one; what it refuses is an error record."""
    llama = Llama(LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval(), str(TINY))
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


# Wrong records

WRONG = [
    ("", "empty"),
    ("{bad", "one JSON object"),
    ("[1, 2]", "holds a list"),
    (b'{"prompt": "\xff"}', "UTF-8"),
    ("[" * 100_000, "nested too deeply"),
    ('{"prompt": "a", "prompt": "b"}', "'prompt' twice"),
    ('{"prompt": "a", "temperature": NaN}', "JSON has no NaN"),
    ('{"prompt": "a", "id": 1e999}', "finite, got 1e999"),
    ({}, "one of prompt, prompt_tokens and messages, got none"),
    ({"prompt": "a", "messages": []}, "got prompt and messages"),
    ({"prompt": ""}, "must not be empty"),
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
]


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


def test_null_fields_and_a_byte_order_mark_say_nothing(llama, tmp_path):
    """What other programs write beside a record changes nothing."""
    lines = [b'\xef\xbb\xbf{"prompt": "love"}\r', b'{"prompt": "lord", "messages": null, "top_p": null}']
    plain = [{"prompt": "love"}, {"prompt": "lord"}]
    assert ask_all(llama, tmp_path, lines) == ask_all(llama, tmp_path, plain, name="plain")


# Standard streams


def test_standard_streams(llama, tmp_path, monkeypatch):
    """`-` reads standard input, and writes standard output in the input's order; each with the other or with a file."""
    records = some_records(10)
    expected = ask_all(llama, tmp_path, records)
    source = write(tmp_path / "in", records)
    for read_from, write_to in [("-", "-"), (source, "-"), ("-", tmp_path / "file")]:
        printed = io.TextIOWrapper(io.BytesIO())
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(source.read_bytes())))
        monkeypatch.setattr("sys.stdout", printed)
        summary = batch.run(llama, read_from, write_to, **SETTINGS, window=4)
        monkeypatch.undo()
        found = printed.buffer.getvalue() if write_to == "-" else (tmp_path / "file").read_bytes()
        assert [json.loads(line) for line in found.splitlines()] == expected
        assert (summary.records, summary.answered, summary.errors) == (10, 10, 0)
        assert summary.tokens == sum(len(answer["tokens"]) for answer in expected)


@pytest.mark.launches
def test_named_pipes_can_be_read(llama, tmp_path):
    """An input that can be read only once is put aside first."""
    records = some_records(3)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    source = write(tmp_path / "in", records)
    with subprocess.Popen(["cp", str(source), str(pipe)]):
        batch.run(llama, pipe, tmp_path / "out", **SETTINGS)
    assert read(tmp_path / "out") == ask_all(llama, tmp_path, records, name="other")


# An output that is there already


def test_a_complete_output_is_left_alone(llama, tmp_path, monkeypatch):
    """The same command again asks the model nothing and touches nothing."""
    first = ask_all(llama, tmp_path, some_records(5))
    before = (tmp_path / "out").stat()
    monkeypatch.setattr(batch.Asker, "ask", None)
    summary = batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS)
    assert (summary.records, summary.answered, summary.errors) == (5, 0, 0)
    assert (tmp_path / "out").stat() == before and read(tmp_path / "out") == first
    assert sorted(os.listdir(tmp_path / "out.run")) == ["keys", "run.json"]


@pytest.mark.parametrize("complete", [True, False])
def test_changed_input_or_settings_are_refused_with_the_ways_out(llama, tmp_path, monkeypatch, complete):
    """Complete or not, nothing is mixed and nothing replaced unless asked for; the refusal names what changed."""
    records = some_records(6)
    source = write(tmp_path / "in", records)
    run = {**SETTINGS, "batch_size": 2}
    if complete:
        batch.run(llama, source, tmp_path / "out", **run)
    else:
        stop_after(monkeypatch, 1)
        with pytest.raises(KeyboardInterrupt):
            batch.run(llama, source, tmp_path / "out", **run)
        monkeypatch.undo()
    for changed, words in [
        ({"temperature": 0.7}, "temperature was 0.6 and is 0.7"),
        ({"seed": 4, "logprobs": True}, "logprobs was False and is True; seed was 3 and is 4"),
        ({"score": True, "existing": "reuse"}, "mode was 'generate'"),
    ]:
        with pytest.raises(Refused, match=words) as caught:
            batch.run(llama, source, tmp_path / "out", **{**run, **changed})
        assert "name another output" in str(caught.value) and "--existing restart" in str(caught.value)
    write(source, [*records, {"prompt": "more"}])
    with pytest.raises(Refused, match="records was 6 and is 7") as caught:
        batch.run(llama, source, tmp_path / "out", **run)
    assert "--existing reuse" in str(caught.value)

    summary = batch.run(llama, source, tmp_path / "out", **run, existing="reuse")
    assert (summary.records, summary.answered) == (7, 1 if complete else 5)
    assert read(tmp_path / "out") == ask_all(llama, tmp_path, [*records, {"prompt": "more"}], name="other")
    summary = batch.run(llama, source, tmp_path / "out", **{**run, "temperature": 0}, existing="restart")
    assert (summary.records, summary.answered) == (7, 7)


def test_reuse_makes_errors_again(llama, tmp_path):
    """A mended record is answered, the others are kept, and those that are gone are left out."""
    records = [{"prompt": "a", "top_p": 5}, *some_records(4)]
    ask_all(llama, tmp_path, records)
    mended = [{"prompt": "a", "top_p": 0.5}, *some_records(4)[1:]]
    summary = batch.run(llama, write(tmp_path / "in", mended), tmp_path / "out", **SETTINGS, existing="reuse")
    assert (summary.records, summary.answered, summary.errors) == (4, 1, 0)
    assert read(tmp_path / "out") == ask_all(llama, tmp_path, mended, name="other")


def test_another_model_is_another_run(llama, tmp_path):
    """The weights are looked at, not only their name; the same ones offloaded are the same."""
    ask_all(llama, tmp_path, some_records(2))
    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight *= 1.001
    with pytest.raises(Refused, match="weights was"):
        ask_all(Llama(model, str(TINY)), tmp_path, some_records(2))
    half = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).eval()
    with pytest.raises(Refused, match="dtype was 'float32' and is 'bfloat16'"):
        ask_all(Llama(half, str(TINY)), tmp_path, some_records(2))
    offloaded = LlamaForCausalLM.from_pretrained(
        TINY,
        dtype=torch.float32,
        device_map={"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
        | {name: "disk" for name in ("model.layers", "model.norm")},
        offload_folder=tmp_path / "offload",
    ).eval()
    assert Llama(offloaded, str(TINY)).model.model.layers[0].mlp.down_proj.weight.device.type == "meta"
    ask_all(Llama(offloaded, str(TINY)), tmp_path, some_records(2))


def test_files_of_others_are_not_touched(llama, tmp_path):
    """An output that no run made, or that was edited since, or that is no file, is refused."""
    source = write(tmp_path / "in", some_records(2))
    mine = tmp_path / "mine"
    mine.write_text("precious")
    with pytest.raises(Refused, match="no run made it as it is"):
        batch.run(llama, source, mine, **SETTINGS)
    assert mine.read_text() == "precious"
    batch.run(llama, source, tmp_path / "out", **SETTINGS)
    with open(tmp_path / "out", "a") as file:
        file.write("edited")
    with pytest.raises(Refused, match="no run made it as it is"):
        batch.run(llama, source, tmp_path / "out", **SETTINGS)
    (tmp_path / "out.run" / "run.json").write_text("{")
    with pytest.raises(Refused, match=r"run\.json.* is corrupted"):
        batch.run(llama, source, tmp_path / "out", **SETTINGS)
    for place, words in [(tmp_path, "must be a file"), (tmp_path / "no" / "out", "folder does not exist")]:
        with pytest.raises(Refused, match=words):
            batch.run(llama, source, place, **SETTINGS)
    with pytest.raises(Refused, match="input cannot be read"):
        batch.run(llama, tmp_path / "nothing", tmp_path / "new", **SETTINGS)


def test_one_run_at_a_time(llama, tmp_path):
    """A second run into the same output is told so."""
    folder = batch.RunFolder(tmp_path / "out")
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "part-00003").touch()
    with folder.open_part(0), pytest.raises(BlockingIOError, match="another run is writing"):
        ask_all(llama, tmp_path, some_records(2))
    with folder.open_part(3), pytest.raises(BlockingIOError, match="another run is writing"):
        ask_all(llama, tmp_path, some_records(2))
    assert len(ask_all(llama, tmp_path, some_records(2))) == 2


def test_machines_that_share_no_file_system_are_told_so(tmp_path, monkeypatch):
    """A process that does not see what the main one made waits for it, and then says what is wrong."""
    monkeypatch.setattr(answers, "_CACHED", 0.3)
    with pytest.raises(FileNotFoundError, match=r"process 1 does not see .*: name an output on a file system that all"):
        batch.RunFolder(tmp_path / "out").open_part(1)


def test_an_input_that_changes_meanwhile_is_noticed(llama, tmp_path, monkeypatch):
    """Lines added during the run are not mixed in."""
    source = write(tmp_path / "in", some_records(4))
    answer = batch.Asker.ask

    def grow(self, questions):
        with open(source, "a") as file:
            file.write('{"prompt": "late"}\n')
        return answer(self, questions)

    monkeypatch.setattr(batch.Asker, "ask", grow)
    with pytest.raises(ValueError, match="changed during the run"):
        batch.run(llama, source, tmp_path / "out", **SETTINGS, window=2)


# Stopped runs


def stop_after(monkeypatch, calls):
    """Ctrl-C when the model is asked once more."""
    ask, left = batch.Asker.ask, itertools.count(calls, -1)

    def stopping(self, questions):
        if next(left) <= 0:
            raise KeyboardInterrupt
        return ask(self, questions)

    monkeypatch.setattr(batch.Asker, "ask", stopping)


def stopped(llama, folder, monkeypatch, *, calls=3):
    """A run of 12 records by twos that stopped on the way; returns its part file and what a whole run gives."""
    records = some_records(12)
    expected = ask_all(llama, folder, records, name="whole", batch_size=2)
    stop_after(monkeypatch, calls)
    with pytest.raises(KeyboardInterrupt):
        ask_all(llama, folder, records, batch_size=2)
    monkeypatch.undo()
    return folder / "out.run" / "part-00000", expected


def test_a_stopped_run_is_taken_up(llama, tmp_path, monkeypatch):
    """What was answered is not asked again, and the output is the same."""
    stopped(llama, tmp_path, monkeypatch)
    summary = batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS, batch_size=2)
    assert summary.answered == 6
    assert filecmp.cmp(tmp_path / "out", tmp_path / "whole", shallow=False)


def test_part_files_of_processes_that_are_no_more_are_read(llama, tmp_path, monkeypatch):
    """A run of eight processes is taken up by one."""
    part, _ = stopped(llama, tmp_path, monkeypatch)
    part.rename(part.with_name("part-00007"))
    summary = batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS, batch_size=2)
    assert summary.answered == 6
    assert filecmp.cmp(tmp_path / "out", tmp_path / "whole", shallow=False)


@pytest.mark.parametrize("kept", [0, 1, 5, 40, 200])
def test_a_torn_end_is_repaired(llama, tmp_path, monkeypatch, kept):
    """However many bytes of the last batch are on the disk, it is made again as a whole."""
    part, _ = stopped(llama, tmp_path, monkeypatch)
    content = part.read_bytes()
    two_batches = len(b"".join(content.splitlines(keepends=True)[:4]))
    part.write_bytes(content[: two_batches + kept])
    summary = batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS, batch_size=2)
    assert summary.answered == 8
    assert filecmp.cmp(tmp_path / "out", tmp_path / "whole", shallow=False)


def test_a_corrupted_part_file_is_refused(llama, tmp_path, monkeypatch):
    """One changed character in the middle: the file and the place are named; without the file the run goes on."""
    part, _ = stopped(llama, tmp_path, monkeypatch)
    content = bytearray(part.read_bytes())
    where = content.index(b'"generation": "') + 16
    content[where] ^= 1
    part.write_bytes(content)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"part-00000' is corrupted at byte \d+: restore it, or remove it"):
            batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS, batch_size=2)
        assert part.read_bytes() == content
    part.unlink()
    batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS, batch_size=2)
    assert filecmp.cmp(tmp_path / "out", tmp_path / "whole", shallow=False)


@pytest.mark.parametrize("when", ["between runs", "at a batch", "before the merge"])
def test_a_vanished_part_file(llama, tmp_path, monkeypatch, when):
    """Between runs its answers are made again; during one an error says so, and the next run completes the output."""
    part, _ = stopped(llama, tmp_path, monkeypatch)
    work = batch._Worker.work
    if when == "between runs":
        part.unlink()
    else:
        ask = batch.Asker.ask

        def vanishing(self, questions):
            part.unlink(missing_ok=True)
            return ask(self, questions)

        def vanished(self, *rest):
            work(self, *rest)
            part.unlink()

        if when == "at a batch":
            monkeypatch.setattr(batch.Asker, "ask", vanishing)
        else:
            monkeypatch.setattr(batch._Worker, "work", vanished)
        with pytest.raises(FileNotFoundError, match="the same command makes"):
            batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS, batch_size=2)
        assert not (tmp_path / "out").exists()
        monkeypatch.undo()
    batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS, batch_size=2)
    assert filecmp.cmp(tmp_path / "out", tmp_path / "whole", shallow=False)


@pytest.mark.parametrize("step", ["merge", "keys", "claim", "parts"])
def test_killed_between_the_last_steps(llama, tmp_path, monkeypatch, step):
    """Wherever the end is cut short, the next run completes it without asking the model."""
    records = some_records(4)
    expected = ask_all(llama, tmp_path, records, name="whole")
    writing, replacing = answers._write, answers._replacing

    def no_write(path, content):
        if (step, path.name) == ("keys", "keys") or (step == "claim" and b'"complete": true' in content):
            raise KeyboardInterrupt
        writing(path, content)

    def no_replace(path, temporary=None):
        if step == "merge" and path.name == "out":
            raise KeyboardInterrupt
        return replacing(path, temporary)

    def no_parts(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(answers, "_write", no_write)
    monkeypatch.setattr(answers, "_replacing", no_replace)
    monkeypatch.setattr(batch.RunFolder, "finished", no_parts)
    with pytest.raises(KeyboardInterrupt):
        ask_all(llama, tmp_path, records)
    monkeypatch.undo()
    monkeypatch.setattr(batch.Asker, "ask", None)
    assert ask_all(llama, tmp_path, records) == expected
    assert sorted(os.listdir(tmp_path / "out.run")) == ["keys", "run.json"]


# Files that cannot be written


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(llama, tmp_path, small_disk, launch):
    """Too little room for the answers, and then for the output: one sentence; with room the run is completed."""
    records = some_records(200)
    source = write(tmp_path / "in", records)
    options = {**SETTINGS, "batch_size": 20}
    batch.run(llama, source, tmp_path / "whole", **options)
    fill = small_disk / "fill"
    for free in (8, 28):  # KB; the answers take some 40, and the output 30
        fill.write_bytes(bytes((128 - free) << 10))
        ended = launch(count=1, input=source, output=small_disk / "out", options=options)
        assert ended.codes == [2] and "No space left on device: free some space" in ended.stderr
        assert not (small_disk / "out").exists()
        fill.unlink()
    fill.write_bytes(bytes(64 << 10))
    with pytest.raises(OSError, match=r"'.*/disk/out' cannot be written: No space left on device"):
        batch.run(llama, source, small_disk / "out", **options)
    kept = sum(batch.RunFolder(small_disk / "out").answered(survey_of(llama, source, options)))
    assert kept == 200
    fill.unlink()
    batch.run(llama, source, small_disk / "out", **options)
    assert filecmp.cmp(tmp_path / "whole", small_disk / "out", shallow=False)


def survey_of(llama, source, options):
    """The first pass of a run."""
    asker = batch.Asker(
        llama,
        score=False,
        temperature=0.6,
        top_p=0.9,
        max_gen_len=options["max_gen_len"],
        seed=options["seed"],
        logprobs=False,
        prompt_logprobs=False,
        top_logprobs=0,
    )
    with open(source, "rb") as file:
        return batch.Survey(file, asker.settings)


def test_a_limit_on_file_sizes(llama, tmp_path, launch):
    """A write that stops in the middle of a batch loses that batch only."""
    records = some_records(60)
    source = write(tmp_path / "in", records)
    options = {**SETTINGS, "batch_size": 5}
    batch.run(llama, source, tmp_path / "whole", **options)
    ended = launch(count=1, input=source, output=tmp_path / "out", options=options, limit=5000)
    assert ended.codes == [2] and "raise the limit on file sizes" in ended.stderr
    assert (tmp_path / "out.run" / "part-00000").stat().st_size == 5000
    summary = batch.run(llama, source, tmp_path / "out", **options)
    assert 20 < summary.answered < 55
    assert filecmp.cmp(tmp_path / "whole", tmp_path / "out", shallow=False)


def test_a_read_only_folder(llama, tmp_path, small_disk):
    """One sentence before the model is asked; what was answered there before is kept."""
    source = write(tmp_path / "in", some_records(4))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="cannot be written: Read-only file system: name an output where"):
        batch.run(llama, source, small_disk / "out", **SETTINGS)
    assert os.listdir(small_disk) == []


# Many processes


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_few_records_on_many_processes(llama, tmp_path, launch, processes):
    """0, 1, 2, 5 and 7 records: in order, none lost, none twice, though some processes get nothing."""
    for count in (0, 1, 2, 5, 7):
        source = write(tmp_path / f"in{count}", some_records(count))
        batch.run(llama, source, tmp_path / f"whole{count}", **SETTINGS, batch_size=1)
        ended = launch(
            count=processes, input=source, output=tmp_path / f"out{count}", options={**SETTINGS, "batch_size": 1}
        )
        assert ended.codes == [0] * processes, ended.stderr
        assert filecmp.cmp(tmp_path / f"out{count}", tmp_path / f"whole{count}", shallow=False)
        assert len(read(tmp_path / f"out{count}")) == count


def test_killed_at_20_random_moments(tmp_path, launch):
    """200 records on 2 processes; both or one of them get SIGKILL, and 1, 2 or 3 take the run up.

    The output, logprobs included, is that of an undisturbed run on one process, byte for byte.
    """
    records = [*some_records(196), "{bad", {"prompt": ""}, "", {"prompt": "x", "seed": -1}]
    random.Random(2).shuffle(records)
    source = write(tmp_path / "in", records)
    options = {"max_gen_len": 6, "batch_size": 8, "window": 64, "logprobs": True}
    whole = launch(count=1, input=source, output=tmp_path / "whole", options=options)
    assert whole.codes == [1], whole.stderr
    undisturbed = launch(count=2, input=source, output=tmp_path / "two", options=options)
    assert undisturbed.codes == [1, 1] and filecmp.cmp(tmp_path / "two", tmp_path / "whole", shallow=False)

    rng = random.Random(0)
    interrupted = 0
    for number in range(20):
        output = tmp_path / f"out{number}"
        ranks = [[0, 1], [0, 1], [0], [1]][number % 4]
        kill = {"after": rng.uniform(0, 0.7) * undisturbed.seconds, "ranks": ranks}
        ended = launch(count=2, input=source, output=output, options=options, kill=kill)
        # The one that was left alone ends by itself, by the error, not by the launcher's patience.
        assert all(code in ((-9, 1) if rank in ranks else (1, 2)) for rank, code in enumerate(ended.codes)), ended
        interrupted += -9 in ended.codes and not output.exists()
        again = launch(count=1 + number % 3, input=source, output=output, options=options)
        assert again.codes == [1] * (1 + number % 3), again.stderr
        assert filecmp.cmp(output, tmp_path / "whole", shallow=False)
    assert interrupted >= 12


def test_killed_again_and_again(tmp_path, launch):
    """One run, killed up to eight times, at changing process counts, before it may complete."""
    source = write(tmp_path / "in", some_records(160))
    options = {"max_gen_len": 8, "batch_size": 4}
    assert launch(count=1, input=source, output=tmp_path / "whole", options=options).codes == [0]
    rng = random.Random(1)
    output = tmp_path / "out"
    for number in range(8):
        count = (3, 2, 1)[number % 3]
        kill = {"after": rng.uniform(0.05, 0.25), "ranks": list(range(count))}
        launch(count=count, input=source, output=output, options=options, kill=kill)
    assert launch(count=1, input=source, output=output, options=options).codes == [0]
    assert filecmp.cmp(output, tmp_path / "whole", shallow=False)


def test_a_refusal_on_many_processes_changes_nothing(llama, tmp_path, launch):
    """Every process ends, and the output is as it was."""
    source = write(tmp_path / "in", some_records(4))
    batch.run(llama, source, tmp_path / "out", **SETTINGS)
    before = (tmp_path / "out").read_bytes()
    ended = launch(count=2, input=source, output=tmp_path / "out", options={**SETTINGS, "seed": 9})
    assert ended.codes == [2, 2] and "seed was 3 and is 9" in ended.stderr
    ended = launch(count=2, input=source, output="-", options=SETTINGS)
    assert ended.codes == [2, 2] and "standard streams belong to one process" in ended.stderr
    assert (tmp_path / "out").read_bytes() == before
    ended = launch(count=2, input=source, output=tmp_path / "out", options=SETTINGS)
    assert ended.codes == [0, 0]


def test_shares_are_even(tmp_path):
    """No process gets more than its share and one batch."""
    rng = random.Random(0)
    costs = sorted((rng.randint(1, 1000) for _ in range(100)), reverse=True)
    for count in (1, 2, 3, 8):
        shares = batch.Shares(count)
        loads = [0] * count
        for cost in costs:
            loads[shares.give(cost)] += cost
        assert max(loads) - min(loads) <= max(costs)
        assert max(loads) <= 1.02 * sum(costs) / count


# Batches and memory


def test_batches_are_the_longest_first_and_within_limits():
    """Every question once; at most so many rows and tokens, unless it is a row alone."""
    rng = random.Random(0)
    questions = [Question(i, None, [1] * rng.randint(1, 50), 1, 1, rng.randint(0, 50), i) for i in range(200)]
    found = list(batch.batches(questions, rows=8, tokens=300))
    assert sorted(question.place for group in found for question in group) == list(range(200))
    lengths = [len(question.prompt) for group in found for question in group]
    assert lengths == sorted(lengths, reverse=True)
    for group in found:
        assert len(group) <= 8 and (len(group) == 1 or batch.cost(group) <= 300)
    assert max(map(len, batch.batches(questions, rows=8, tokens=500))) == 8
    assert list(batch.batches(reversed(questions), rows=8, tokens=300)) == found


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA out of memory. Tried"), MemoryError()],
)
def test_out_of_memory_halves_the_batch(llama, tmp_path, monkeypatch, caplog, error):
    """Down to what fits, logged, and not tried again at the size that did not; the answers are the same."""
    records = some_records(24)
    expected = ask_all(llama, tmp_path, records)
    generate, sizes = llama.model.generate, []

    def small(prompts, **settings):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise error
        return generate(prompts, **settings)

    monkeypatch.setattr(llama.model, "generate", small, raising=False)
    assert ask_all(llama, tmp_path, records, name="halved", batch_size=12) == expected
    assert sizes[:3] == [12, 6, 3] and sum(size for size in sizes if size <= 3) == 24
    assert [record.getMessage() for record in caplog.records] == [
        f"out of memory with a batch of {size} records: halved" for size in sizes if size > 3
    ]
    assert len(caplog.records) <= 4


def test_a_record_that_does_not_fit_alone_becomes_an_error(llama, tmp_path, monkeypatch):
    """The floor is one record; with `strict` the run stops there."""
    records = [{"prompt": "short"}, {"prompt": "long " * 50}, {"prompt": "short too"}]
    expected = ask_all(llama, tmp_path, records)
    generate = llama.model.generate

    def small(prompts, **settings):
        if max(map(len, prompts)) > 50:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(prompts, **settings)

    monkeypatch.setattr(llama.model, "generate", small, raising=False)
    answers = ask_all(llama, tmp_path, records, name="out2")
    assert [answers[0], answers[2]] == [expected[0], expected[2]]
    assert answers[1]["line"] == 2 and "memory does not hold this record alone" in answers[1]["error"]
    with pytest.raises(ValueError, match="line 2: the memory"):
        ask_all(llama, tmp_path, records, name="out3", strict=True)


def test_logits_that_are_not_finite_cost_one_record(llama, tmp_path, monkeypatch):
    """The record whose logits overflow gets the error; its batch goes on without it."""
    records = [{"prompt_tokens": [1, 5, 6]}, {"prompt_tokens": [1, 7]}, {"prompt_tokens": [1, 5]}]
    expected = ask_all(llama, tmp_path, records)
    forward = llama.model.forward

    def overflowing(input_ids, **rest):
        output = forward(input_ids, **rest)
        output.logits[(input_ids == 7).any(-1)] = float("nan")
        return output

    monkeypatch.setattr(llama.model, "forward", overflowing, raising=False)
    answers = ask_all(llama, tmp_path, records, name="nan")
    assert [answers[0], answers[2]] == [expected[0], expected[2]]
    assert "nan or inf" in answers[1]["error"] and answers[1]["line"] == 2


def test_other_errors_stop_the_run(llama, tmp_path, monkeypatch):
    """An error in the program is not the record's."""

    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(llama.model, "generate", broken, raising=False)
    with pytest.raises(RuntimeError, match="mat1"):
        ask_all(llama, tmp_path, some_records(2))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_that_is_too_small(tmp_path):
    """A real out-of-memory error, from a GPU's allocator, halves the batch too."""
    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    expected = ask_all(Llama(model, str(TINY)), tmp_path, some_records(400), batch_size=400, batch_tokens=10**9)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((32 << 20) / total)
    try:
        llama = Llama(model.to("cuda"), str(TINY))
        sizes, generate = [], model.generate
        llama.model.generate = lambda prompts, **rest: (sizes.append(len(prompts)), generate(prompts, **rest))[1]
        found = ask_all(llama, tmp_path, some_records(400), name="small", batch_size=400, batch_tokens=10**9)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sizes[0] == 400 and sizes[1] == 200
    same = sum(one["tokens"] == other["tokens"] for one, other in zip(found, expected, strict=True))
    assert same >= 390  # other hardware, other rounding


def test_memory_is_flat(llama, tmp_path, monkeypatch):
    """Of 20,000 short records no more is held than of 2,000, but for some 40 bytes each."""

    def echo(self, questions):
        return [Answer(q.place, {"id": q.id, "generation": "", "tokens": q.prompt}, 1) for q in questions]

    monkeypatch.setattr(batch.Asker, "ask", echo)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    peaks = []
    for count in (100, 2_000, 20_000):
        records = ({"id": i, "prompt_tokens": [1, i % 1000, i // 1000]} for i in range(count))
        source = write(tmp_path / f"in{count}", records)
        tracemalloc.start()
        batch.run(llama, source, tmp_path / f"out{count}", **SETTINGS, window=256)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert [len(read(tmp_path / f"out{count}")) for count in (2_000, 20_000)] == [2_000, 20_000]
    assert peaks[2] - peaks[1] < 18_000 * 60


# The command


def command(*arguments, llama=None):
    """`run_command`, with the arguments that the command line makes of these."""
    parsed = cli._parser().parse_args(["batch", *map(str, arguments), "--max-gen-len", "12"])
    return batch.run_command(parsed, lambda _: llama)


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


@pytest.mark.launches
def test_launched_by_accelerate(llama, tmp_path):
    """Two processes from the command line: the status, the output, and one sentence where it is refused."""
    source = write(tmp_path / "in", some_records(5))
    batch.run(llama, source, tmp_path / "whole", temperature=0.8, max_gen_len=6)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    with socket.socket() as free:  # the launcher does not look for a port; 0 would leave its processes waiting
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launcher += ["--main_process_port", port, "-m", "hf_llama_sampling", "batch", source, tmp_path / "out"]
    options = ["--temperature", "0.8", "--max-gen-len", "6"]
    ended = subprocess.run([*launcher, *options], capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
    assert ended.returncode == 0, ended.stderr
    assert filecmp.cmp(tmp_path / "out", tmp_path / "whole", shallow=False)
    assert ended.stdout == "" and ended.stderr.count("5 records, 0 errors") == 1


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


@pytest.mark.parametrize("existing", ["check", "reuse", "restart"])
def test_no_output_stands_on_an_input_or_on_a_file_of_others(llama, tmp_path, existing):
    """Whatever `existing` says, and by whatever name: inputs and files of others stay as they are."""
    source = write(tmp_path / "in", some_records(2))
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    before = Path(source).read_bytes()
    for name in ("in", "link", "hard"):
        with pytest.raises(Refused, match="must not stand on the input") as caught:
            batch.run(llama, source, tmp_path / name, **SETTINGS, existing=existing)
        assert "restart" not in str(caught.value)
    batch.run(llama, source, tmp_path / "out", **SETTINGS)
    with pytest.raises(Refused, match="must not stand on the input"):
        batch.run(llama, tmp_path / "out", tmp_path / "out", **SETTINGS, existing=existing)
    with pytest.raises(Refused, match="must not stand on the input"):
        batch.run(llama, tmp_path / "out.run" / "run.json", tmp_path / "out", **SETTINGS, existing=existing)
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "taken.run").mkdir()
    (tmp_path / "taken.run" / "keys").write_text("precious")
    for name in ("mine", "taken"):
        with pytest.raises(Refused, match="name another output, or move the f"):
            batch.run(llama, source, tmp_path / name, **SETTINGS, existing=existing)
    edited = (tmp_path / "out").read_bytes().replace(b"tokens", b"tokenz")
    (tmp_path / "out").write_bytes(edited)
    with pytest.raises(Refused, match="no run made it as it is"):
        batch.run(llama, source, tmp_path / "out", **SETTINGS, existing=existing)
    assert (tmp_path / "out").read_bytes() == edited
    assert Path(source).read_bytes() == before
    assert {(tmp_path / "mine").read_text(), (tmp_path / "taken.run" / "keys").read_text()} == {"precious"}


@pytest.mark.launches
def test_no_output_stands_on_the_file_behind_standard_input(tmp_path):
    """`batch - FILE < FILE` is refused too, by the command, before a model is loaded."""
    source = write(tmp_path / "in", some_records(2))
    before = Path(source).read_bytes()
    for source_name in ("-", str(source)):
        with open(source, "rb") as stdin:
            ran = subprocess.run(
                [sys.executable, "-m", "hf_llama_sampling", "batch", source_name, str(source), "--existing", "restart"],
                stdin=stdin,
                capture_output=True,
                text=True,
            )
        assert ran.returncode == 2 and "must not stand on the input" in ran.stderr
    assert Path(source).read_bytes() == before
