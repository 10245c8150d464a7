"""Records, runs and stopped runs for the batch tests."""

import itertools
import json
import os
import random
import sys

import pytest

from hf_llama_sampling import batch
from hf_llama_sampling.batch.engine import Engine
from tests.conftest import HERE

# What launched processes get: one thread each, and the packages that this process has.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, sys.path)])}
SETTINGS = {"max_gen_len": 12, "seed": 3}
WORDS = ["the", "king", "and", "queen", "of", "love", "to", "thee", "my", "lord", "what", "shall", "I", "say"]


def write(path, records):
    """Records as JSONL; strings and bytes stand for themselves."""
    lines = [record if isinstance(record, (str, bytes)) else json.dumps(record) for record in records]
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def read(path):
    """The records of an output."""
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


def stop_after(monkeypatch, calls):
    """Ctrl-C when the model is asked once more."""
    ask, left = Engine.run, itertools.count(calls, -1)

    def stopping(self, requests):
        if next(left) <= 0:
            raise KeyboardInterrupt
        return ask(self, requests)

    monkeypatch.setattr(Engine, "run", stopping)


def stopped(llama, folder, monkeypatch, *, calls=3):
    """A run of 12 records by twos that stopped on the way; returns its shard and what a whole run gives."""
    records = some_records(12)
    expected = ask_all(llama, folder, records, name="whole", batch_size=2)
    stop_after(monkeypatch, calls)
    with pytest.raises(KeyboardInterrupt):
        ask_all(llama, folder, records, batch_size=2)
    monkeypatch.undo()
    return folder / "out.run" / "shard-00000", expected
