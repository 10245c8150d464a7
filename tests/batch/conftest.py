"""Fixtures of the batch tests: one model for all, and a launcher of several processes."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hf_llama_sampling import Llama
from tests.batch.helpers import ONE_THREAD
from tests.conftest import HERE, TINY


@pytest.fixture(scope="session")
def llama(tiny_model):
    """The bundled model; nothing in a batch run needs torch's global generator."""
    return Llama(tiny_model, str(TINY))


@pytest.fixture(scope="session")
def launch():
    """`launch(count=2, input=..., output=..., options=...)`: a run on so many processes of one thread each."""
    environment = {**os.environ, **ONE_THREAD, "TOKENIZERS_PARALLELISM": "0"}
    command = [sys.executable, str(HERE / "batch" / "processes.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:

        def ask(**task):
            server.stdin.write(json.dumps(task, default=str) + "\n")
            server.stdin.flush()
            return SimpleNamespace(**json.loads(server.stdout.readline()))

        yield ask
        server.stdin.close()
