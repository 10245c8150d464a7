"""What README and docs say beside their code blocks: links, commands, names of tests and files, figures."""

import ast
import re
import shlex

import pytest
import torch

from hf_llama_sampling.cli import main
from tests.benchmarks import summary
from tests.conftest import HERE, PACKAGE
from tests.docs.test_blocks import FENCE, PAGES, ROOT, blocks_of

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs"


def options_of(module_source: str) -> set[str]:
    """The options that a module's parser spells out."""
    calls = [node for node in ast.walk(ast.parse(module_source)) if isinstance(node, ast.Call)]
    named = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    return {word.value for call in named for word in call.args if isinstance(word, ast.Constant)}


def anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, as hosts make them: lower case, no punctuation, blanks as hyphens."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def commands_there_are(capsys) -> set[str]:
    """The commands that `--help` lists."""
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = set(re.findall(r"^    ([a-z-]+)(?: |$)", capsys.readouterr().out, flags=re.MULTILINE))
    assert {"complete", "chat", "batch", "parity"} <= commands
    return commands


def test_the_readme_is_short():
    """At most 120 lines: what is longer has a page of its own."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    """Every relative link, and its anchor, leads to something."""
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text()))
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors_of(target.read_text()), f"{page.name} links to {link}"


def test_every_page_is_linked_from_the_readme():
    """Both READMEs lead to every page of docs."""
    for readme in ("README.md", "README.zh-CN.md"):
        text = (ROOT / readme).read_text()
        assert [page.name for page in DOCS.glob("*.md") if f"(docs/{page.name})" not in text] == []


def test_both_readmes_run_the_same_code():
    """The Chinese README holds the English one's blocks, but for comments, and the article's example besides."""

    def code(name):
        return [re.sub(r"\s*#.*", "", block.text) for block in blocks_of(ROOT / name) if block.language != "sh"]

    english, chinese = code("README.md"), code("README.zh-CN.md")
    assert [block for block in english if block not in chinese] == []
    extra = "".join(block for block in chinese if block not in english)
    assert "sample_top_p(probs, top_p)" in extra and "skip_special_tokens=True" in extra


def test_commands_exist(capsys):
    """Each command of an `sh` block, and each command and option named in the text, is one that there is."""
    helps = {}
    for command in commands_there_are(capsys):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        helps[command] = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    everything = set().union(*helps.values())
    makefile = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    extras = set(re.findall(r"^([a-z-]+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE))
    benchmarks = options_of((HERE / "benchmarks" / "__main__.py").read_text())

    for page in PAGES:
        for block in blocks_of(page):
            if block.language != "sh":
                continue
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                where = f"{page.name}: {line}"
                if not words:
                    continue
                options = {word for word in words if word.startswith("--")}
                if words[0] == "make":
                    assert set(words[1:]) <= makefile, where
                elif words[0].endswith("pip"):
                    assert set(re.findall(r"\[(.*)\]", line)) <= extras, where
                elif words[0] == "hf-llama-sampling":
                    assert options <= helps[words[1]], where
                elif words[:2] == ["accelerate", "launch"]:
                    after = words[words.index("hf_llama_sampling") :]
                    assert {word for word in after if word.startswith("--")} <= helps[after[1]], where
                else:
                    assert words[1:3] in (["-m", "tests.benchmarks"], ["-m", "tests.benchmarks.summary"]), where
                    assert options <= benchmarks, where
        text = FENCE.sub("", page.read_text())
        named = set(re.findall(r"`(--[a-z][a-z-]*)", text))
        assert named <= everything | benchmarks, page.name
        assert set(re.findall(r"`hf-llama-sampling ([a-z-]+)", text)) <= set(helps), page.name
        assert set(re.findall(r"`make ([a-z-]+)`", text)) <= makefile, page.name


def test_the_readme_names_every_command(capsys):
    """A new command has a line in both READMEs."""
    commands = commands_there_are(capsys)
    for readme in ("README.md", "README.zh-CN.md"):
        text = (ROOT / readme).read_text()
        assert [command for command in commands if f"`hf-llama-sampling {command}" not in text] == []


def test_promises_are_held():
    """Every test that docs/promises.md names exists, and every line of its tables names one."""
    text = (DOCS / "promises.md").read_text()
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| promise"):
            assert "`tests/" in line, line
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) == text.count("`tests/") and len(named) > 40
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text())
        tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert test in tests, f"{file} has no {test}"


def test_the_file_tree_is_the_packages():
    """docs/architecture.md names every module of the package, and none that is not there."""
    tree = next(block.text for block in blocks_of(DOCS / "architecture.md") if "hf_llama_sampling/\n" in block.text)
    named, folder = set(), ""
    for line in tree.splitlines()[1:]:
        entry = re.split(r"\s{2,}", line.strip())[0]
        if line.startswith("  ") and line[2] != " ":
            folder = entry if entry.endswith("/") else ""
            named |= set() if folder else {name.strip() for name in entry.split(",")}
        elif entry.endswith(".py"):
            named.add(folder + entry)
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert named == modules


def test_the_layers_are_the_contracts():
    """docs/architecture.md draws the layers that import-linter checks."""
    layers = ast.literal_eval(re.search(r"^layers = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1])
    assert "\n".join(layers) + "\n" in [block.text for block in blocks_of(DOCS / "architecture.md")]


def test_names_of_the_rules_are_where_the_table_says():
    """The last table of docs/architecture.md: each name is defined in a file of its line."""
    table = (DOCS / "architecture.md").read_text().partition("| rule | file | name |")[2]
    rows = [re.findall(r"`([\w/.]+)`", line.split(" | ", 1)[1]) for line in table.splitlines()[2:] if line]
    assert len(rows) > 8
    for words in rows:
        files = [word for word in words if word.endswith(".py")]
        text = "".join((PACKAGE / file).read_text() for file in files)
        for name in (word for word in words if word not in files):
            outer, *inner = name.split(".")
            assert re.search(rf"^(?:def|class) {outer}\b", text, flags=re.MULTILINE), f"{name} is not in {files}"
            for method in inner:
                assert re.search(rf"^    def {method}\b", text, flags=re.MULTILINE), f"{name} is not in {files}"


def test_files_that_the_pages_name_exist():
    """`sampling/streams.py` and its like, in any page."""
    for page in PAGES:
        for name in re.findall(r"`((?:\w+/)*\w+\.py)`", page.read_text()):
            found = [base for base in (ROOT, PACKAGE) if (base / name).is_file()]
            inside = list(PACKAGE.rglob(name))
            assert found or inside or name == "llama/generation.py", f"{page.name} names {name}"


def test_the_summary_is_the_tables():
    """The READMEs' five ratios are those of docs/performance.md."""
    values = summary.figures((DOCS / "performance.md").read_text())
    assert summary.markdown(values) in (ROOT / "README.md").read_text()
    chinese = re.findall(r"\| (\d\.\d\d) \|$", (ROOT / "README.zh-CN.md").read_text(), flags=re.MULTILINE)
    assert chinese == [f"{value:.2f}" for value in values]


def test_the_summary_can_be_drawn(tmp_path):
    """The picture is drawn from the table alone."""
    summary.draw(tmp_path / "speed.png", [0.1, 0.7, 1.2, 0.9, 0.05])
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_quirks_are_named_once():
    """One table names each quirk."""
    text = (DOCS / "coming-from-llama.md").read_text()
    assert [row for row in "abc" if text.count(f"\n| {row} |") == 1] == ["a", "b", "c"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_parity_on_cuda(capsys):
    """The one command that the docs name for a GPU."""
    assert main(["parity", "--device", "cuda"]) == 0
