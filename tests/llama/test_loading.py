"""Checkpoints in transformers' forms: whole ones, broken ones, and adapters of PEFT."""

import importlib.util
import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_llama_sampling import Llama, LlamaForCausalLM
from tests.conftest import TINY

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled checkpoint, to be broken."""
    return shutil.copytree(TINY, tmp_path / "copy")


def build(folder):
    return Llama.build(folder, TINY / "tokenizer.model", max_seq_len=32, max_batch_size=1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "lacks model.norm.weight: fetch it again"),
        (
            lambda weights: weights.update({f"module.{name}": weights.pop(name) for name in list(weights)}),
            r"lacks lm_head.weight and \d+ more",
        ),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(191)}),
            r"differs: model.norm.weight is \[191\] and not \[192\]",
        ),
    ],
    ids=["a weight is missing", "names are others", "a shape is another"],
)
def test_weights_that_would_be_random_are_refused(folder, change, says):
    """transformers fills what it does not find with random numbers, and says so in a table that scrolls by."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"must hold every weight of the model .*{says}"):
        build(folder)


@pytest.mark.parametrize("kept", [0, 1000, 100_000, "a pointer of git lfs"])
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_cannot_be_read_are_refused(folder, form, kept):
    """A download that was cut short, and what git leaves without its lfs."""
    if form == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / form)
        (folder / "model.safetensors").unlink()
    file = folder / form
    file.write_bytes(POINTER if isinstance(kept, str) else file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"files of a checkpoint must be whole, .*copy' cannot be read \("):
        build(folder)


def test_a_tokenizer_that_cannot_be_read_is_refused(folder):
    """As its weights are."""
    (folder / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(ValueError, match="files of a tokenizer must be whole"):
        Llama.build(folder, folder, max_seq_len=32, max_batch_size=1)


def test_a_model_of_another_kind_is_refused_for_what_it_is(tmp_path):
    """In one sentence, not with a list of all kinds."""
    transformers.T5Config().save_pretrained(tmp_path)  # its files are not looked for
    with pytest.raises(ValueError, match=r"must be a decoder-only causal language model, .* of another kind \(T5\)"):
        build(tmp_path)


def saved_adapter(folder, adapter, base=str(TINY)):
    """Save a model under an adapter as PEFT does, with the name of its base model."""
    adapted = peft.get_peft_model(LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32), adapter).eval()
    adapted.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return adapted


def lora(**more):
    return peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **more)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@torch.no_grad()
def test_an_adapters_folder_is_its_model(tiny_model, tmp_path):
    """PEFT writes the base model's name beside the adapter, and both are loaded."""
    adapted = saved_adapter(tmp_path, lora())
    asked = [[1, 17, 300]], 8, 0.0
    expected = adapted.generate(asked[0], max_gen_len=8, temperature=0).tokens
    assert build(tmp_path).generate(*asked)[0] == expected
    assert tiny_model.generate(asked[0], max_gen_len=8, temperature=0).tokens != expected


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize(
    ("adapter", "base", "says"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), str(TINY), "transformers loads no soft"),
        (lora(), None, "must name its base model, and .* names None: load both with PEFT"),
        (lora(), "/no/such/base", "'/no/such/base' does not exist: check the path"),
    ],
    ids=["soft prompts", "no base", "a base that is not there"],
)
def test_adapters_that_cannot_be_loaded_are_refused(tmp_path, adapter, base, says):
    """With the way out, or with what is missing."""
    saved_adapter(tmp_path, adapter, base)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        build(tmp_path)


def test_an_adapter_without_peft_is_refused(tmp_path, monkeypatch):
    """It says what to install."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(TINY)}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="an adapter, which needs PEFT to be loaded: pip install peft"):
        build(tmp_path)
