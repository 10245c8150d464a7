"""The README's Python runs as it stands; only the names of models are replaced by the bundled one."""

import re

import pytest
import torch
from conftest import HERE, TINY

BLOCKS = re.findall(r"```python\n(.*?)```", (HERE.parent / "README.md").read_text(), flags=re.DOTALL)


def test_blocks(capsys, tiny_tokenizer):
    """Every block runs, in order, and prints something."""
    assert len(BLOCKS) == 3
    names = {"inputs": tiny_tokenizer("ROMEO:", return_tensors="pt")}
    for block in BLOCKS:
        here = block.replace('"hf_llama_sampling/tiny_llama"', repr(str(TINY)))
        here = here.replace('"llama-2-7b-chat/"', repr(str(TINY)))
        here = here.replace('"tokenizer.model"', repr(str(TINY / "tokenizer.model")))
        exec(compile(here, "README.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_quirks_are_named_once():
    """One table names each quirk."""
    text = (HERE.parent / "README.md").read_text()
    assert [row for row in "abc" if text.count(f"\n| {row} |") == 1] == ["a", "b", "c"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_parity_on_cuda(capsys):
    """The one command that the README names for a GPU."""
    from hf_llama_sampling.cli import main

    assert main(["parity", "--device", "cuda"]) == 0
