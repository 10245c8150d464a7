"""Standard streams and pipes, and what stands on standard error."""

import io
import json
import os
import subprocess

import pytest

from hf_llama_sampling import batch
from hf_llama_sampling.batch import Refused
from tests.batch.helpers import SETTINGS, ask_all, read, some_records, write


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


def test_streams_carry_bytes_whatever_their_encoding(llama, tmp_path, monkeypatch):
    """Standard streams that say ASCII lose no character of ids, kept fields and answers."""
    records = [{"id": "é你😀", "prompt": "love é", "more": "ü"}, {"id": "\ud800", "prompt": "\ud800"}]
    source = write(tmp_path / "in", [json.dumps(record, ensure_ascii=i == 1) for i, record in enumerate(records)])
    batch.run(llama, source, tmp_path / "out", **SETTINGS, keep_fields=True)
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(source.read_bytes()), encoding="ascii"))
    monkeypatch.setattr("sys.stdout", printed)
    batch.run(llama, "-", "-", **SETTINGS, keep_fields=True)
    monkeypatch.undo()
    assert printed.buffer.getvalue() == (tmp_path / "out").read_bytes()
    assert [answer["id"] for answer in read(tmp_path / "out")] == ["é你😀", "\ud800"]


def test_streams_of_text_only_will_do(llama, tmp_path, monkeypatch):
    """Notebooks' streams have no bytes beneath."""
    source = write(tmp_path / "in", ['{"id": "é", "prompt": "love"}'])
    expected = ask_all(llama, tmp_path, ['{"id": "é", "prompt": "love"}'])
    monkeypatch.setattr("sys.stdin", io.StringIO(source.read_text()))
    monkeypatch.setattr("sys.stdout", io.StringIO())
    batch.run(llama, "-", "-", **SETTINGS)
    text = __import__("sys").stdout.getvalue()
    monkeypatch.undo()
    assert [json.loads(line) for line in text.splitlines()] == expected


def test_closed_streams_are_missed_only_where_they_are_needed(llama, tmp_path, monkeypatch):
    """A run from file to file needs none; "-" for a closed one is refused in a sentence."""
    source = write(tmp_path / "in", [*some_records(3), "{bad"])
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", None)
    summary = batch.run(llama, source, tmp_path / "out", **SETTINGS)
    with pytest.raises(Refused, match="standard input is closed: open it, or name a file"):
        batch.run(llama, "-", tmp_path / "new", **SETTINGS)
    with pytest.raises(Refused, match="standard output is closed"):
        batch.run(llama, source, "-", **SETTINGS)
    monkeypatch.undo()
    assert (summary.records, summary.errors) == (4, 1)
