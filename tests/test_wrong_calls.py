"""Wrong calls of both APIs, the command line and batch files: each is refused in the sentence that is written down.

`wrong_calls.txt` holds them, a call on one line and its refusal, indented, on the next.
"""

import contextlib
import copy
import io
import json
import logging
import os
import sys
import tempfile
from math import inf, nan
from pathlib import Path

import pytest
import torch
import transformers

import hf_llama_sampling
from hf_llama_sampling import Llama, Tokenizer, batch
from hf_llama_sampling.cli import main
from tests.conftest import HERE, TINY

LINES = [line for line in (HERE / "wrong_calls.txt").read_text().splitlines() if line and not line.startswith("#")]
CALLS = dict(zip(LINES[::2], (line.removeprefix("    ") for line in LINES[1::2]), strict=True))


@pytest.fixture(scope="module")
def names(tiny_model, tiny_tokenizer, tmp_path_factory):
    """What the calls may name."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    (folder / "in.jsonl").write_text('{"prompt": "a"}\n')
    tokenizer = str(TINY / "tokenizer.model")
    llama = Llama(tiny_model, tokenizer, max_seq_len=64, max_batch_size=4)
    public = {name: getattr(hf_llama_sampling, name) for name in hf_llama_sampling.__all__}
    return {
        **public,
        "batch": batch,
        **{"torch": torch, "nan": nan, "inf": inf, "TextStreamer": transformers.TextStreamer, "folder": folder},
        **{"model": tiny_model, "tokenizer": tiny_tokenizer, "llama": llama, "tokens": Tokenizer(tokenizer)},
        **{"plain": transformers.LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32), "TINY": str(TINY)},
        **batching(copy.deepcopy(tiny_model)),
        **{"ids": torch.tensor([[1, 5, 6]]), "command": command, "record": lambda content: record(llama, content)},
    }


def batching(model):
    """What calls of continuous batching name, if transformers is a release for it."""
    try:
        manager = model.init_continuous_batching(max_gen_len=4)
    except ValueError:
        return {}
    return {"manager": manager, "Batching": transformers.ContinuousBatchingConfig}


def command(*arguments):
    """Run a command on closed standard input; its refusal is the last line on standard error, and its status 2."""
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            status = main(list(arguments))
        except SystemExit as stop:  # argparse's own refusals
            status = stop.code
    assert status == 2 and printed.getvalue() == "", (status, printed.getvalue(), said.getvalue())
    raise Said(said.getvalue().splitlines()[-1])


def record(llama, content):
    """Answer a batch file of one line; the refusal is the answer's error."""
    line = content if isinstance(content, bytes) else json.dumps(content).encode()
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "in"), Path(folder, "out")
        source.write_bytes(line + b"\n")
        batch.run(llama, source, output, max_gen_len=2)
        raise Said(json.loads(output.read_text())["error"])


class Said(Exception):
    """A refusal that was printed or written."""


def refusal_of(call, names):
    """The error's built-in type and its sentence; fails if the call gives an answer."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            answer = eval(call, names)
    except Said as said:
        return str(said)
    except (ValueError, TypeError, OSError) as error:
        kind = next(base for base in type(error).__mro__ if base.__module__ == "builtins")
        return f"{kind.__name__}: {error}"
    pytest.fail(f"{call} gave an answer: {str(answer)[:200]}")


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_call_is_refused_in_one_sentence(call, names, monkeypatch):
    """By ValueError, TypeError or OSError, status 2 or an error record; never by a traceback of another kind."""
    if "manager" not in names and any(name in call for name in ("manager", "Batching", "_batch(", "_batching(")):
        pytest.skip("this release of transformers is none for continuous batching")
    if "cuda" in call and torch.cuda.is_available():
        pytest.skip("this machine has what the call asks for")
    monkeypatch.chdir(names["folder"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(logging.root.manager, "disable", logging.WARNING)
    assert refusal_of(call, names).replace(f"{os.getcwd()}/", "") == CALLS[call]
    assert sorted(os.listdir()) == ["binary", "empty", "in.jsonl"]


def test_there_are_many():
    """At least 80, of every entrance."""
    entrances = ["model.", "Llama", "llama.", "tokens.", "sample_top_p", "command(", "record("]
    assert len(CALLS) >= 80 and all(sum(call.startswith(name) for call in CALLS) >= 5 for name in entrances)
