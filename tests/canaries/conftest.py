"""The bundled model in transformers' own class."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import TINY


@pytest.fixture(scope="session")
def plain():
    """transformers' own class, in float32; nothing of this package runs."""
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
