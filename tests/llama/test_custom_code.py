"""No code that comes with a checkpoint runs, by whatever entrance it is loaded."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from hf_llama_sampling import Llama, LlamaForCausalLM, with_llama_generation
from hf_llama_sampling.cli import main
from hf_llama_sampling.llama.loading import load_tokenizer
from tests.conftest import TINY

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Own(LlamaForCausalLM): pass
class OwnConfig(LlamaConfig): pass
class OwnTokenizer(PreTrainedTokenizerFast): pass
def generate(*args, **kwargs): pass
"""


def edit(path: Path, **fields: object) -> None:
    """Set fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the bundled model with code beside it that leaves a mark when it runs."""
    shutil.copytree(TINY, tmp_path / "copy")
    code = CODE.format(mark=str(tmp_path / "ran"))
    (tmp_path / "copy" / "own.py").write_text(code)
    (tmp_path / "copy" / "custom_generate").mkdir()
    (tmp_path / "copy" / "custom_generate" / "generate.py").write_text(code)
    return tmp_path / "copy"


@pytest.fixture
def own_tokenizer(copy: Path) -> Path:
    """The copy, with a tokenizer class of its own."""
    auto_map = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    edit(copy / "tokenizer_config.json", auto_map=auto_map, tokenizer_class=None, backend=None)
    return copy


@pytest.fixture
def own_model(copy: Path) -> Path:
    """The copy, with a model class of its own."""
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    edit(copy / "config.json", auto_map=auto_map, model_type="own")
    return copy


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path: Path):
    """The claim of every test here."""
    yield
    assert not (tmp_path / "ran").exists()


def check_refused(status: int, out: str, error: str) -> None:
    """One sentence that names the way out, and nothing on standard output."""
    assert status == 2 and out == ""
    assert "code that comes with a checkpoint is never run here" in error
    assert "trust_remote_code=True" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["chat"], "y\nhello\n"),
        (["complete"], "y\nROMEO:\n"),
        (["complete", "ROMEO:", "--tokenizer", str(TINY)], "y\n"),
        (["batch", "-", "-"], 'y\n{"prompt": "ROMEO:"}\n'),
        (["parity", "--quick"], "y\n"),
    ],
)
def test_commands_do_not_ask_their_input(
    own_tokenizer: Path,
    own_model: Path,
    command: list[str],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A line of the user's data is never taken as consent: the command refuses and names the way out."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    check_refused(main([*command, "--model", str(own_model)]), *capfd.readouterr())


@pytest.mark.launches
def test_a_command_of_its_own_does_not_ask_its_input(own_tokenizer: Path, own_model: Path) -> None:
    """The same in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-m", "hf_llama_sampling", "chat", "--model", str(own_model)],
        input="y\nhello\n",
        capture_output=True,
        text=True,
    )
    check_refused(ran.returncode, ran.stdout, ran.stderr)


def test_tokenizers_with_code_are_refused(own_tokenizer: Path) -> None:
    """`load_tokenizer` and `Llama.build` refuse, whichever way the folder is named."""
    for source in (own_tokenizer, str(own_tokenizer), own_tokenizer / "tokenizer.json"):
        with pytest.raises(ValueError, match=r"the tokenizer of .* needs its own: load it yourself with AutoTokenizer"):
            load_tokenizer(source)
    with pytest.raises(ValueError, match="never run here, and the tokenizer"):
        Llama.build(str(TINY), str(own_tokenizer), 64, 4)


def test_models_with_code_are_refused(own_model: Path) -> None:
    """`Llama.build` refuses a model class of the checkpoint's own."""
    with pytest.raises(ValueError, match=r"the model of .* needs its own: load it yourself with AutoModelForCausalLM"):
        Llama.build(str(own_model), str(TINY), 64, 4)


def test_a_native_class_is_taken_instead(copy: Path) -> None:
    """A checkpoint that names code beside a class of transformers' own is loaded with the latter."""
    edit(copy / "config.json", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    edit(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]})
    llama = Llama.build(str(copy), str(copy), 64, 4)
    assert llama.text_completion(["ROMEO:"], max_gen_len=2)[0]["generation"]


def test_custom_generate_of_a_checkpoint_is_not_loaded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with our class, trusted or not, nor with a model that gets the mixin; nothing is asked."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    for trusted in (None, True, False):
        model = LlamaForCausalLM.from_pretrained(copy, dtype=torch.float32, trust_remote_code=trusted)
        assert model.generate([[1, 5]], max_gen_len=2).finish_reason
    plain = with_llama_generation(transformers.AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32))
    with pytest.raises(ValueError, match="custom_generate has no place"):
        plain.generate([[1, 5]], max_gen_len=2, custom_generate=str(copy), trust_remote_code=True)
