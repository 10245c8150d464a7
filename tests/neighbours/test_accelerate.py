"""accelerate's placement: layers on the CPU and on the disk, hooks on every module, before ours and after it."""

import copy

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_llama_sampling import with_llama_generation
from tests.conftest import TINY
from tests.generation.helpers import RAGGED, close

pytestmark = pytest.mark.slow

ASKED = {"max_gen_len": 5, "seeds": 1, "echo": True, "logprobs": True}


def fresh():
    """A model of this test's own: hooks stay on it."""
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def half_on_disk(model, folder):
    """Every second layer on the disk."""
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    places |= {f"model.layers.{layer}": ("cpu", "disk")[layer % 2] for layer in range(4)}
    return accelerate.dispatch_model(model, places, offload_dir=folder, main_device="cpu")


PLACED = {
    "dispatch_model": half_on_disk,
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, execution_device=torch.device("cpu")) or model,
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, torch.device("cpu")) or model,
    "prepare": lambda model, folder: accelerate.Accelerator(cpu=True).prepare(model),
}


@pytest.mark.parametrize("first", ["placed first", "ours first"])
@pytest.mark.parametrize("how", PLACED)
def test_a_placed_model_answers_as_before(tiny_model, tmp_path, how, first):
    """Tokens and logprobs are the resident model's, up to rounding: weights are fetched, and nothing else changes."""
    place = PLACED[how]
    model = fresh()
    model = (
        with_llama_generation(place(model, tmp_path))
        if first == "placed first"
        else place(with_llama_generation(model), tmp_path)
    )
    ours, plain = model.generate(RAGGED, **ASKED), tiny_model.generate(RAGGED, **ASKED)
    assert ours.tokens == plain.tokens
    close(ours.logprobs, plain.logprobs)
    close(model.score_tokens(RAGGED).logprobs, tiny_model.score_tokens(RAGGED).logprobs)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_a_copy_of_a_placed_model_stands_by_itself(tiny_model, tmp_path):
    """`deepcopy` of an offloaded model generates too, and saving it writes whole weights."""
    model = with_llama_generation(half_on_disk(fresh(), tmp_path / "weights"))
    expected = tiny_model.generate(RAGGED, **ASKED).tokens
    assert copy.deepcopy(model).generate(RAGGED, **ASKED).tokens == expected
    model.save_pretrained(tmp_path / "saved")
    again = with_llama_generation(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval())
    assert again.generate(RAGGED, **ASKED).tokens == expected
