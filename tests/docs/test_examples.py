"""Every example runs on the bundled model, launched as its docstring says."""

import ast
import math
import runpy
import shutil
import subprocess
import sys
import warnings

import pytest

from tests.conftest import HERE, TINY

pytestmark = pytest.mark.slow

EXAMPLES = HERE.parent / "examples"
ARGUMENTS = {
    "text_completion.py": [TINY, TINY / "tokenizer.model"],
    "chat_completion.py": [TINY, TINY / "tokenizer.model"],
    "warpers_in_transformers.py": [TINY],
    "prompt_logprobs.py": [TINY],
    "several_samples.py": [TINY],
    "multiple_choice.py": [TINY],
    "continuous_batching.py": [TINY],
    "offload.py": [TINY],
    "chat_template.py": ["a model with a template"],
    "evaluate.py": [TINY],
    "streaming_logprobs.py": [TINY],
}
PRINTED = {
    "text_completion.py": "The king is\n> ",
    "chat_completion.py": "> Assistant: Error: special tags are not allowed as part of the prompt.",
    "warpers_in_transformers.py": "JULIET:\nO",
    "prompt_logprobs.py": "'the king': -13.31 nats, perplexity 77",
    "several_samples.py": "the second prompt alone gives the same samples: True",
    "multiple_choice.py": "nats, ",
    "continuous_batching.py": "JULIET's lines are those of generate: True",
    "offload.py": "787,200 of 1,771,200 weights are on the disk",
    "chat_template.py": "user: And London? (",
    "streaming_logprobs.py": "'\\n' -0.02\n",
    "evaluate.py": "who_speaks: accuracy 0.5, standard error 0.50",
}
TESTED_ELSEWHERE = ["train_tiny_llama.py", "plot_sampling.py", "ray_batch.py", "demo.py"]
HARNESS = ["evaluate.py"]  # importing it asks git for a version


@pytest.fixture
def templated(tmp_path):
    """The bundled model, whose tokenizer now has a chat template."""
    shutil.copytree(TINY, tmp_path / "templated")
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
    (tmp_path / "templated" / "chat_template.jinja").write_text(template)
    return tmp_path / "templated"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.launches] if name in HARNESS else []) for name in ARGUMENTS],
)
def test_example_runs(name, monkeypatch, capsys, templated):
    """It ends without an error or a warning, and prints what it is about."""
    if name in HARNESS:
        pytest.importorskip("lm_eval", reason="needs lm_eval: install the extra lm-eval")
        warnings.simplefilter("ignore")  # the libraries that the harness imports warn on their own account
    arguments = [templated if argument == "a model with a template" else argument for argument in ARGUMENTS[name]]
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert PRINTED[name] in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted({*ARGUMENTS, "plot_sampling.py", "demo.py"} - {*HARNESS}))
@pytest.mark.parametrize("given", [0, 5])
def test_example_says_its_usage(name, given, monkeypatch):
    """Without its arguments, or with too many, it prints its docstring, which holds the command."""
    monkeypatch.setattr(sys, "argv", [name, *"x" * given])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert f"python examples/{name}" in str(stop.value.code)


def test_every_example_is_run():
    """A new example needs a line here, or a test of its own."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*ARGUMENTS, *TESTED_ELSEWHERE}


@pytest.mark.parametrize("name", [*ARGUMENTS, *TESTED_ELSEWHERE])
def test_example_says_how_it_is_launched(name):
    """The command stands in the docstring, with as many arguments as the example takes."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / name).read_text())) or ""
    command = next(line.split() for line in docstring.splitlines() if f"examples/{name}" in line)
    assert len(command) - 2 >= len(ARGUMENTS.get(name, []))


def test_perplexity_counts_scored_tokens_only():
    """The first token's 0.0 is no logprob: three tokens at -1 nat each have a perplexity of e."""
    perplexity = runpy.run_path(str(EXAMPLES / "prompt_logprobs.py"))["perplexity"]
    assert perplexity([0.0, -1.0, -1.0, -1.0]) == pytest.approx(math.e)


@pytest.mark.trains
def test_training_writes_a_model_that_loads(tmp_path):
    """Two steps on a small text write a complete folder: weights, both tokenizers, and a card with the figures."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_llama_sampling import Tokenizer

    words = ["the", "king", "and", "queen", "of", "every", "land", "shall", "speak", "with", "hope", "or", "sorrow"]
    lines = [" ".join(words[(i * k + k) % len(words)] for k in range(1, 9)) for i in range(400)]
    text = tmp_path / "plays.txt"
    text.write_text("\n\n".join(f"SPEAKER {i % 7}:\n{line}, {i}" for i, line in enumerate(lines)))
    command = [
        sys.executable,
        EXAMPLES / "train_tiny_llama.py",
        text,
        tmp_path / "out",
        "--steps",
        "2",
        "--vocab",
        "320",
    ]
    subprocess.run(command, capture_output=True, check=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain, fast = Tokenizer(tmp_path / "out" / "tokenizer.model"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == plain.n_words == len(fast)
    for sample in ("SPEAKER 1:\nthe king", "  two spaces", "\u00e9 \U0001f642"):
        assert fast(sample).input_ids == plain.encode(sample, bos=True, eos=False)
    assert "unigram baseline" in (tmp_path / "out" / "README.md").read_text()
