"""Files of commands: written only where nothing is lost."""

import json
import os
from pathlib import Path

import pytest

from hf_llama_sampling.cli import main
from hf_llama_sampling.evaluation import files
from hf_llama_sampling.evaluation.files import check_target, write_whole
from hf_llama_sampling.evaluation.page import _MARK, is_page


def check(path, inputs):
    return check_target(path, inputs, "page", is_page)


def test_only_pages_of_this_command_are_replaced(tmp_path, monkeypatch):
    """New files and older pages; not inputs by any name, other files, empty ones, folders, nor files in no folder."""
    monkeypatch.chdir(tmp_path)
    content = _MARK + "<p>a poem</p>"
    write_whole(check("new.html", ["text.txt"]), content)
    assert Path("new.html").read_text() == content
    write_whole(check("new.html", ["text.txt"]), content + "<!-- again -->")
    assert Path("new.html").read_text().endswith("again -->")
    Path("text.txt").write_text("a poem")
    Path("empty").write_text("")
    os.link("new.html", "other name.html")
    os.symlink("new.html", "link.html")
    for path, inputs, words in [
        ("text.txt", ["text.txt"], "must not overwrite"),
        ("new.html", ["other name.html"], "must not overwrite"),
        ("link.html", ["new.html"], "must not overwrite"),
        ("text.txt", [], "something else"),
        ("empty", [], "something else"),
        (".", [], "something else"),
        ("/dev/null", [], "something else"),
        ("no/folder.html", [], "is not there"),
        ("-", [], "a file of its own"),
        ("", [], "a file of its own"),
    ]:
        with pytest.raises(ValueError, match=words):
            check(path, inputs)
    with open("new.html") as read, pytest.raises(ValueError, match="must not overwrite"):
        check("new.html", [read.fileno()])
    assert Path("text.txt").read_text() == "a poem"
    write_whole(check("link.html", []), content)
    assert Path("link.html").is_symlink() and Path("new.html").read_text() == content


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """An error on the way leaves the older page, and no other file."""
    target = tmp_path / "page.html"
    write_whole(target, "first")
    assert target.stat().st_mode & 0o777 == 0o666 & ~files._umask()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_whole(target, "second")
    assert target.read_text() == "first" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("content", "words"),
    [("a poem", "something else"), ("[]", "something else"), ("", "something else"), (None, "is not there")],
)
def test_results_replace_results_alone(content, words, tmp_path, monkeypatch, capsys):
    """`lm-eval --output` refuses other files, and folders that are not there, before it loads a model."""
    monkeypatch.setattr("hf_llama_sampling.llama.llama.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    target = tmp_path / "missing" / "x.json" if content is None else tmp_path / "x.json"
    if content is not None:
        target.write_text(content)
    assert main(["lm-eval", "--tasks", "any", "--output", str(target)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert content is None or target.read_text() == content


def test_results_replace_results(tmp_path):
    """An evaluation may be run again."""
    from hf_llama_sampling.evaluation.report import is_results

    target = tmp_path / "x.json"
    target.write_text(json.dumps({"results": {}}))
    assert check_target(str(target), [], "file of results", is_results) == target
