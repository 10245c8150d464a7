"""The README's Python runs as it stands; only the names of models are replaced by the bundled one."""

import re

import pytest
import torch

from hf_llama_sampling.cli import main
from tests.conftest import HERE, TINY

BLOCKS = re.findall(r"```python\n(.*?)```", (HERE.parent / "README.md").read_text(), flags=re.DOTALL)


def test_blocks(capsys):
    """Every block runs, in order, and prints something."""
    assert len(BLOCKS) == 3
    names: dict[str, object] = {}
    for block in BLOCKS:
        here = block.replace('"hf_llama_sampling/tiny_llama"', repr(str(TINY)))
        here = here.replace('"llama-2-7b-chat/"', repr(str(TINY)))
        here = here.replace('"tokenizer.model"', repr(str(TINY / "tokenizer.model")))
        exec(compile(here, "README.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_the_batch_example(tmp_path):
    """The record is answered as printed."""
    record, answer = re.findall(r"```json\n(.*)\n(.*)\n```", (HERE.parent / "README.md").read_text())[0]
    (tmp_path / "in").write_text(record + "\n")
    assert main(["batch", str(tmp_path / "in"), str(tmp_path / "out"), "--seed", "1"]) == 0
    assert (tmp_path / "out").read_text() == answer + "\n"


def test_quirks_are_named_once():
    """One table names each quirk."""
    text = (HERE.parent / "README.md").read_text()
    assert [row for row in "abc" if text.count(f"\n| {row} |") == 1] == ["a", "b", "c"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_parity_on_cuda(capsys):
    """The one command that the README names for a GPU."""
    assert main(["parity", "--device", "cuda"]) == 0
