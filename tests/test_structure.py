"""The structure that the design asks for: which way imports point, and how long functions are."""

import shutil
import subprocess
import sys

import pytest

from tests import structure
from tests.conftest import HERE, PACKAGE

ROOT = HERE.parent
# Functions that may be longer than 50 lines, each with its reason.
MAY_BE_LONG = {
    "hf_llama_sampling.generation.mixin.LlamaGenerationMixin.generate": "its signature, and four numbered phases",
    "hf_llama_sampling.reference.reference_generate": "the reference's loop, to be read beside Meta's",
}
# What must not be, one import for each contract, and the contract that says so.
PLANTED = {
    ("checks.py", "from . import generation"): "Imports point down",
    ("reference.py", "from .sampling import settings"): "Imports point down",
    ("generation/trimming.py", "from . import mixin"): "No cycles within a room",
    ("sampling/settings.py", "from .. import Llama"): "Nothing imports from the package's __init__",
    ("llama/dialog.py", "from hf_llama_sampling import Llama"): "Nothing imports from the package's __init__",
    ("defaults.py", "import hf_llama_sampling"): "Nothing imports from the package's __init__",
    ("batch/store.py", "from . import run"): "Nothing in a room imports from a room's __init__",
    ("llama/tokenizer.py", "import torch"): "Text and trimming do without torch",
}


def lint(folder):
    """Each contract's verdict, and the whole report, for the package in a folder."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder)})
    lines = ended.stdout.splitlines()
    return {line.rsplit(" ", 1)[0]: line.endswith(" KEPT") for line in lines if line.endswith((" KEPT", " BROKEN"))}


@pytest.fixture
def copy(tmp_path):
    """The package and its contracts in a folder of their own."""
    shutil.copytree(PACKAGE, tmp_path / "hf_llama_sampling", ignore=shutil.ignore_patterns("tiny*"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.launches
def test_contracts_are_kept(copy):
    """Imports point down, and nothing imports from an `__init__`: as `make test` checks them."""
    verdicts = lint(copy)
    assert set(PLANTED.values()) <= set(verdicts)
    assert all(verdicts.values()), verdicts


@pytest.mark.launches
@pytest.mark.parametrize(("file", "line"), PLANTED)
def test_contracts_catch_what_they_forbid(copy, file, line):
    """A planted import breaks its contract."""
    path = copy / "hf_llama_sampling" / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    assert lint(copy)[PLANTED[file, line]] is False


def test_functions_fit_on_a_screen():
    """No function has more than 50 lines, docstring apart, but those named here."""
    assert [one for one in structure.long_functions(PACKAGE.parent) if one.name not in MAY_BE_LONG] == []


def test_the_meter_counts(tmp_path):
    """Lines without the docstring, arguments without self, attributes assigned on self, imports from above."""
    package = tmp_path / structure.PACKAGE
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").write_text("LIMIT = 3\n")
    (package / "room" / "__init__.py").write_text("from .. import LIMIT\n")
    body = "\n".join(f"        self.a{i} = a" for i in range(50))
    arguments = ", ".join(f"a{i}" for i in range(8))
    (package / "room" / "state.py").write_text(
        "from . import inner\nfrom .. import LIMIT\nfrom hf_llama_sampling import room\n"
        f'class State:\n    def __init__(self, a, {arguments}):\n        """One\n        two."""\n{body}\n'
        f"    def short(self, {arguments}):\n        self.a1 = a1\n"
    )
    (package / "room" / "inner.py").write_text("")
    name = "hf_llama_sampling.room.state.State"
    assert structure.long_functions(tmp_path) == [(f"{name}.__init__", 51)]
    assert structure.functions_of_many_arguments(tmp_path) == [(f"{name}.__init__", 9)]
    assert structure.state_objects(tmp_path) == [(name, 50)]
    assert structure.imports_from_init(tmp_path) == [
        "hf_llama_sampling.room imports LIMIT from hf_llama_sampling",
        "hf_llama_sampling.room.state imports LIMIT from hf_llama_sampling",
    ]
