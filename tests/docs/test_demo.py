"""What `make demo` runs."""

import runpy
from pathlib import Path

from tests.conftest import HERE

ROOT = HERE.parent


def test_the_demo_ends_with_the_page(tmp_path, capsys, monkeypatch):
    """Completions, the parity line, and last where the page was written; `tests/test_cli.py` runs the comparisons."""
    monkeypatch.setattr("hf_llama_sampling.parity.checks", lambda model, **_: [])
    demo = runpy.run_path(str(ROOT / "examples" / "demo.py"))["main"]
    demo(str(tmp_path / "demo"))
    printed = capsys.readouterr().out
    assert "--- prompt 2: First Citizen:" in printed and "parity: all equal" in printed
    page = Path(printed.splitlines()[-1].removeprefix("page written to "))
    assert page == tmp_path / "demo" / "demo.html" and "slings" in page.read_text()


def test_make_demo_runs_the_demo():
    """And installs what its colours need."""
    makefile = (ROOT / "Makefile").read_text()
    assert "examples/demo.py build/demo" in makefile and '".[report]"' in makefile
