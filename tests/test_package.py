"""The public surface, the bundled model, and what the built wheel carries."""

import ast
import email
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
import torch
import transformers
import yaml
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_llama_sampling
from hf_llama_sampling.generation.releases import OLDEST
from tests import matrix
from tests.conftest import HERE, PACKAGE, TINY

ROOT = HERE.parent
SURFACE = [
    "ChatPrediction",
    "CompletionPrediction",
    "Dialog",
    "InfillingPrediction",
    "Llama",
    "LlamaContinuationOutput",
    "LlamaForCausalLM",
    "LlamaGenerateOutput",
    "LlamaGenerationMixin",
    "LlamaSampler",
    "LlamaScoreOutput",
    "LlamaTemperatureLogitsWarper",
    "LlamaTopPLogitsWarper",
    "Message",
    "PromptCache",
    "Role",
    "TokenEvent",
    "Tokenizer",
    "sample_top_p",
    "with_llama_generation",
]


def test_public_surface():
    """What a user may import is exactly this; a change is deliberate."""
    assert sorted(hf_llama_sampling.__all__) == SURFACE
    assert all(getattr(hf_llama_sampling, name).__doc__ for name in SURFACE if name not in ("Dialog", "Role"))


@pytest.mark.launches
@pytest.mark.parametrize("module", ["generation.trimming", "llama.dialog", "llama.tokenizer"])
def test_pure_modules_do_not_import_torch(module):
    """They can be loaded, and read, without the rest."""
    code = (
        "import sys, types, importlib\n"
        "package = types.ModuleType('hf_llama_sampling')\n"
        f"package.__path__ = [{str(PACKAGE)!r}]\n"
        "sys.modules['hf_llama_sampling'] = package\n"
        f"importlib.import_module('hf_llama_sampling.{module}')\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_reference_imports_nothing_of_the_rest():
    """The oracle does not share code with what it checks."""
    source = (PACKAGE / "reference.py").read_text()
    assert "hf_llama_sampling" not in source.replace("facebookresearch", "") and "from ." not in source


def test_bundled_model_is_small_and_plain():
    """At most 4 MB in all, 16-bit, grouped-query attention; loads with transformers' own classes."""
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 4_000_000
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="auto")
    assert model.dtype == torch.float16
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id is None


def test_bundled_model_is_better_than_counting_words(tiny_model):
    """Its card's figures: far below the unigram baseline, and reproduced here on text that it was not trained on."""
    card = (TINY / "README.md").read_text()
    rows = [line.split("|") for line in card.splitlines() if line.startswith("| ")]
    loss = {row[1].strip(): float(row[2]) for row in rows if row[2].strip()[0].isdigit()}
    assert loss["this model"] < 0.6 * loss["unigram baseline"]
    tokenizer = hf_llama_sampling.Tokenizer(TINY / "tokenizer.model")
    text = "HERMIA:\nI pray thee, speak no more of love to me,\nFor I have sworn to leave this house to-night."
    ids = tokenizer.encode(text, bos=True, eos=True)
    (logprobs,) = tiny_model.score_tokens([ids]).logprobs
    assert -sum(logprobs) / (len(ids) - 1) < 0.75 * loss["unigram baseline"]


@pytest.mark.slow
def test_bundled_model_learned_to_stop(tiny_model):
    """Most sampled speeches end by EOS before 200 tokens."""
    output = tiny_model.generate([[1]] * 16, max_gen_len=200, seeds=0)
    assert output.finish_reason.count("stop") >= 12


HEAVY = ["torch", "transformers", "numpy", "rich", "matplotlib", "pandas", "accelerate", "lm_eval", "ray"]


@pytest.mark.launches
def test_importing_the_package_imports_nothing_heavy():
    """`import hf_llama_sampling` warns of nothing and leaves torch and its like until a name is used."""
    code = f"import sys, hf_llama_sampling\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)


def test_one_version_everywhere():
    """The changelog's newest release and the citation are the package's version; changes to come stand above it."""
    headings = re.findall(r"^## \[(.*?)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    version, day = headings[1]
    assert version == hf_llama_sampling.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], str(citation["date-released"]), citation["license"]) == (version, day, "Apache-2.0")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_what_the_package_imports_is_declared():
    """Each distribution that a module imports stands among the dependencies or the extras, not only among theirs."""
    trees = [ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level and node.module}
    foreign = {name.partition(".")[0] for name in named} - sys.stdlib_module_names - {PACKAGE.name}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        requirement for name in ("lm-eval", "report", "gguf") for requirement in project["optional-dependencies"][name]
    ]
    declared = {re.match(r"[\w-]+", requirement)[0] for requirement in (*project["dependencies"], *extras)}
    assert {"torch", "transformers", "packaging"} <= foreign <= declared


def test_the_oldest_python_is_the_one_that_transformers_asks_for():
    """pyproject.toml, its classifiers, both READMEs and docs/versions.md name the same floor."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    classified = [line.rpartition(" :: ")[2] for line in project["classifiers"] if ":: Python :: 3." in line]
    assert classified[0] == oldest
    if Version(transformers.__version__).release[:2] == Version(OLDEST).release:  # a newer one may ask for more
        assert importlib.metadata.metadata("transformers")["Requires-Python"].startswith(f">={oldest}")
    assert all(f"Python >= {oldest}" in (ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
    tested = re.search(
        r"^\| Python \| ([\d.]+).*? \| (.*) \|$", (ROOT / "docs" / "versions.md").read_text(), re.MULTILINE
    )
    assert tested[1] == oldest and all(release in tested[2] for release in classified)


def test_the_oldest_transformers_is_said_once():
    """pyproject.toml, the sentence of the import and both READMEs name the same floor."""
    assert f'"transformers>={OLDEST}"' in (ROOT / "pyproject.toml").read_text()
    assert all(f"transformers >= {OLDEST}" in (ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))


def test_the_matrix_begins_at_the_floors():
    """`make matrix` runs the oldest releases that pyproject.toml allows, and the ones that the tests are pinned to."""
    floors = re.findall(r'"(torch|transformers)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert sorted(matrix.RELEASES["floor"]) == [f"{name}=={version}.0" for name, version in sorted(floors)]
    pinned = (HERE / "constraints.txt").read_text().splitlines()
    assert set(matrix.RELEASES["pinned"]) <= set(pinned)
    kept = matrix.constraints(matrix.RELEASES["floor"]).splitlines()
    assert set(matrix.RELEASES["floor"]) <= set(kept)
    assert sum(line.startswith("torch==") for line in kept) == 1


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that is built from this checkout."""
    if not (ROOT / PACKAGE.name).is_dir():
        pytest.skip("no source tree: the tests run against an installed wheel")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, str(folder), str(ROOT)], check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.mark.builds
def test_wheel_carries_the_model_and_the_types(wheel):
    """The built wheel holds the bundled model and py.typed, and no tests."""
    names = wheel.namelist()
    assert "hf_llama_sampling/py.typed" in names
    assert "hf_llama_sampling/tiny_llama/model.safetensors" in names
    assert "hf_llama_sampling/tiny_llama/tokenizer.model" in names
    assert {"hf_llama_sampling/evaluation/page.css", "hf_llama_sampling/evaluation/page.js"} <= set(names)
    assert {name.partition("/")[0] for name in names} == {
        "hf_llama_sampling",
        f"hf_llama_sampling-{hf_llama_sampling.__version__}.dist-info",
    }


@pytest.mark.builds
def test_wheel_says_what_it_is(wheel):
    """Its metadata: version, licence with its text, README, extras, links, command."""
    info = f"hf_llama_sampling-{hf_llama_sampling.__version__}.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["Name"] == "hf-llama-sampling" and metadata["Version"] == hf_llama_sampling.__version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"gguf", "lm-eval", "ray", "report"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata.get_all("Project-URL") and metadata["Summary"] and metadata["Keywords"]
    lowest = metadata["Requires-Python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {lowest}" in metadata.get_all("Classifier")
    assert "hf-llama-sampling = hf_llama_sampling.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
