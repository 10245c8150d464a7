"""Every code block of README and docs runs, in order, page by page, and prints what the page shows.

- ``python``: executed; a ``text`` block right after it is what it prints.
- ``console``: lines after ``$ `` are run in a shell, what follows them is what they print.
- ``sh``: commands that install, build or need more machines; checked by `test_pages.py` instead.

A page runs in an empty folder, as after an installation. Shown text must be equal, decimal fractions within
`tolerance`, and ``...`` stands for anything.
"""

import contextlib
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hf_llama_sampling.cli import main
from tests.conftest import GOLDEN, HERE, OTHER_DRAWS, draws_as_recorded

pytestmark = pytest.mark.slow

ROOT = HERE.parent
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "console", "text", "sh"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
NUMBER = r"-?\d+\.\d+(?:e[-+]?\d+)?"
# Pages whose text was drawn from torch's generator, and a recorded answer that tells whether this torch has the same.
DRAWN_BY_TORCH = {"README.md", "README.zh-CN.md", "coming-from-llama.md"}
CASE = json.loads((GOLDEN / "generate.json").read_text())["cases"][0]
SHELL = set("|<>&;$*(")


class Block(NamedTuple):
    """A fenced block: where it begins, its language and text, and the printed text that follows it."""

    line: int
    language: str
    text: str
    shown: str | None = None


def blocks_of(page: Path) -> list[Block]:
    """A page's blocks. A ``text`` block with only blank lines between it and a ``python`` block belongs to that."""
    text, blocks, end = page.read_text(), [], 0
    for found in FENCE.finditer(text):
        block = Block(text.count("\n", 0, found.start()) + 1, found[1], found[2])
        beside = not text[end : found.start()].strip()
        if beside and block.language == "text" and blocks and blocks[-1].language == "python":
            blocks[-1] = blocks[-1]._replace(shown=block.text)
        else:
            blocks.append(block)
        end = found.end()
    return blocks


def tolerance(shown: str) -> float:
    """One unit of the last printed digit, and 64 float32 steps at the number's size, of logits up to 16 at least."""
    mantissa, _, exponent = shown.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return unit + 64 * torch.finfo(torch.float32).eps * max(16.0, abs(float(shown)))


def check_printed(shown: str, printed: str, where: str) -> None:
    """The printed text is the shown one, but for the rounding of numbers and what ``...`` leaves out."""
    shown, printed = ("\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (shown, printed))
    pieces = re.split(rf"({NUMBER}|\.\.\.)", shown)
    numbers = [piece for piece in pieces[1::2] if piece != "..."]
    pattern = "".join(
        re.escape(piece) if place % 2 == 0 else ".*?" if piece == "..." else f"({NUMBER})"
        for place, piece in enumerate(pieces)
    )
    match = re.fullmatch(pattern, printed, flags=re.DOTALL)
    assert match, f"{where} shows\n{shown}\nand prints\n{printed}"
    for one, other in zip(numbers, match.groups(), strict=True):
        close = math.isclose(float(one), float(other), rel_tol=0, abs_tol=tolerance(one))
        assert close, f"{where} shows {one} and prints {other}:\n{printed}"


def run_python(block: Block, names: dict[str, object], where: str) -> str:
    """Execute a block in the page's namespace; returns what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block.text, where, "exec"), names)
    return out.getvalue()


def commands_of(block: Block) -> list[tuple[str, str]]:
    """A console block's commands, each with the output shown below it."""
    text = block.text.replace("\\\n", " ")
    pairs = [piece.partition("\n") for piece in re.split(r"^\$ ", text, flags=re.MULTILINE)]
    assert not pairs[0][0], f"a console block begins with '$ ', got {pairs[0][0]!r}"
    return [(command, shown) for command, _, shown in pairs[1:]]


def needs_shell(command: str) -> bool:
    """Whether a command is more than one call of the package's own."""
    return not command.startswith("hf-llama-sampling ") or bool(SHELL & set(command))


HARNESS = "import lm_eval"  # it asks git for a version


def launches(page: Path) -> bool:
    """Whether a page's blocks start processes."""
    if HARNESS in page.read_text():
        return True
    consoles = [block for block in blocks_of(page) if block.language == "console"]
    return any(needs_shell(command) for block in consoles for command, _ in commands_of(block))


def run_command(command: str) -> str:
    """What a command prints. The package's own command runs in this process, where torch is imported already."""
    if needs_shell(command):
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(out):
        assert main(shlex.split(command)[1:]) == 0, command
    return out.buffer.getvalue().decode()  # type: ignore[attr-defined]


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """The working directory is empty, and the package's command is on the path."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "hf-llama-sampling"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m hf_llama_sampling "$@"\n')
    command.chmod(0o755)
    path = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.chdir(tmp_path / "empty")


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=[pytest.mark.launches] if launches(page) else []) for page in PAGES],
)
def test_blocks_run_as_shown(page, empty_folder):
    """Each block runs after those before it on its page, and prints what is shown."""
    if HARNESS in page.read_text():
        pytest.importorskip("lm_eval", reason="needs lm_eval: install the extra lm-eval")
        warnings.simplefilter("ignore")  # the libraries that the harness imports warn on their own account
    if page.name in DRAWN_BY_TORCH and not draws_as_recorded(CASE["seed"], CASE["rng_canary"]):
        pytest.skip(OTHER_DRAWS)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page):
        where = f"{page.name}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: a block is one of {sorted(LANGUAGES)}"
        if block.language == "python":
            printed = run_python(block, names, where)
            check_printed(block.shown or "", printed, where)
        elif block.language == "console":
            for command, shown in commands_of(block):
                check_printed(shown, run_command(command), f"{where}: {command}")


def test_a_wrong_output_is_noticed():
    """The comparison can fail: other text, a number off by two units, a line too many; and `...` spans lines."""
    check_printed("a -1.25 b", "a -1.2401 b", "page")
    check_printed("a\n...\nd", "a\nb\nc\nd", "page")
    for printed in ("a -1.25 c", "a -1.27 b", "a -1.25 b\nmore"):
        with pytest.raises(AssertionError, match="page shows"):
            check_printed("a -1.25 b", printed, "page")
