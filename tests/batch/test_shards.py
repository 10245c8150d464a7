"""One shard: whole batches or none, a torn end cut off, any other damage refused."""

import filecmp
import random
import tempfile
from pathlib import Path

import pytest

from hf_llama_sampling import batch
from hf_llama_sampling.batch.requests import Response
from hf_llama_sampling.batch.shards import ERROR, Shard, decode, read_lines, repair
from tests.batch.helpers import SETTINGS, some_records, stopped, write

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kept", [0, 1, 5, 40, 200])
def test_a_torn_end_is_repaired(llama, tmp_path, monkeypatch, kept):
    """However many bytes of the last batch are on the disk, it is made again as a whole."""
    shard, _ = stopped(llama, tmp_path, monkeypatch)
    content = shard.read_bytes()
    two_batches = len(b"".join(content.splitlines(keepends=True)[:4]))
    shard.write_bytes(content[: two_batches + kept])
    summary = batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS, batch_size=2)
    assert summary.answered == 8
    assert filecmp.cmp(tmp_path / "out", tmp_path / "whole", shallow=False)


def test_a_corrupted_shard_is_refused(llama, tmp_path, monkeypatch):
    """One changed character in the middle: the file and the place are named; without the file the run goes on."""
    shard, _ = stopped(llama, tmp_path, monkeypatch)
    content = bytearray(shard.read_bytes())
    where = content.index(b'"generation": "') + 16
    content[where] ^= 1
    shard.write_bytes(content)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"shard-00000' is corrupted at byte \d+: restore it, or remove it"):
            batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS, batch_size=2)
        assert shard.read_bytes() == content
    shard.unlink()
    batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS, batch_size=2)
    assert filecmp.cmp(tmp_path / "out", tmp_path / "whole", shallow=False)


def test_a_limit_on_file_sizes(llama, tmp_path, launch):
    """A write that stops in the middle of a batch loses that batch only."""
    records = some_records(60)
    source = write(tmp_path / "in", records)
    options = {**SETTINGS, "batch_size": 5}
    batch.run(llama, source, tmp_path / "whole", **options)
    ended = launch(count=1, input=source, output=tmp_path / "out", options=options, limit=5000)
    assert ended.codes == [2] and "raise the limit on file sizes" in ended.stderr
    assert (tmp_path / "out.run" / "shard-00000").stat().st_size == 5000
    summary = batch.run(llama, source, tmp_path / "out", **options)
    assert 20 < summary.answered < 55
    assert filecmp.cmp(tmp_path / "whole", tmp_path / "out", shallow=False)


def test_a_line_that_was_changed_anywhere_is_noticed():
    """Any one byte of a line exchanged for another: it is no line any more."""
    responses = [Response(0, b'{"id": 1, "generation": "love"}', 3)]
    line = shard_of(responses)
    whole = decode(line)
    assert whole is not None and (whole.key, whole.left, whole.tokens, whole.json) == (7, 0, 3, responses[0].json)
    rng = random.Random(0)
    for at in range(len(line)):
        changed = bytearray(line)
        changed[at] ^= 1 << rng.randrange(8)
        assert decode(bytes(changed)) is None


def shard_of(responses, keys=(7,)):
    """The bytes that a batch leaves in a shard."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        with Shard(path) as shard:
            shard.append(keys, responses)
        return path.read_bytes()


def test_repair_keeps_whole_batches(tmp_path):
    """A shard of two batches, cut at every byte: what is left is both, the first, or nothing."""
    first = shard_of([Response(i, b'{"id": %d}' % i, 1) for i in range(2)], keys=(1, 2))
    second = shard_of([Response(2, b'{"error": "no"}', 0, "no")], keys=(3,))
    path = tmp_path / "shard"
    for length in range(len(first + second) + 1):
        path.write_bytes((first + second)[:length])
        repair(path)
        whole = first + second if length == len(first + second) else first if length >= len(first) else b""
        assert path.read_bytes() == whole
    path.write_bytes(first + second)
    assert [line.tokens for _, line in read_lines(path)] == [1, 1, ERROR]
