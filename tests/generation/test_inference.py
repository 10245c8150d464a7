"""Runs under `torch.inference_mode` leave ordinary tensors behind: in answers, in the model, and with the caller."""

import contextlib
import copy

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache

from hf_llama_sampling import PromptCache, with_llama_generation
from hf_llama_sampling.generation.probe import KNOWN
from hf_llama_sampling.generation.releases import CACHE_NAME
from tests.families.zoo import FAMILIES, build
from tests.generation.helpers import LONG, RAGGED

EVERYTHING = {"output_logits": True, "output_hidden_states": True, "output_attentions": True}


def tensors_in(value):
    """All tensors of nested outputs and caches."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Cache):
        for layer in value.layers:
            yield from (item for item in vars(layer).values() if isinstance(item, torch.Tensor))


def all_ordinary(*values):
    """Whether there are tensors, and autograd can save each."""
    found = [tensor for value in values for tensor in tensors_in(value)]
    return bool(found) and not any(tensor.is_inference() for tensor in found)


@pytest.fixture
def modes(monkeypatch):
    """Whether each forward ran under inference mode."""
    seen, original = [], transformers.models.llama.modeling_llama.LlamaModel.forward

    def noted(self, *args, **kwargs):
        seen.append(torch.is_inference_mode_enabled())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaModel, "forward", noted)
    return seen


@pytest.fixture
def model(tiny_model):
    """A model of the test's own."""
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation("eager")
    return model


def can_be_trained(model):
    """A step of training, through a text and a loss."""
    model(input_ids=torch.tensor([LONG]), labels=torch.tensor([LONG])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_what_a_call_returns_can_be_trained_on(model, modes):
    """Sequences, caches, logits, hidden states and attentions of lists and tensors. The runs are under the mode, until
    transformers has put hooks of its own on the model, which give it the hidden states."""
    asked = {"max_gen_len": 3, "seeds": 1, "eos_token_id": []}
    assert all_ordinary(model.generate(torch.tensor([LONG]), **asked))
    for prompts in (RAGGED, torch.tensor([LONG])):
        out = model.generate(prompts, **asked, return_dict_in_generate=True, logprobs=True, echo=True, **EVERYTHING)
        assert all_ordinary(out.sequences, out.past_key_values, out.logits, out.hidden_states, out.attentions)
    assert all(modes[:6]) and len(modes) == 9
    probe = torch.nn.Linear(out.hidden_states[0][-1].shape[-1], 1)
    probe(out.hidden_states[0][-1]).sum().backward()
    goes_on = model(torch.tensor([[5]]), use_cache=True, **{CACHE_NAME: out.past_key_values})
    goes_on.logits.sum().backward()
    can_be_trained(model)


def test_scores_leave_a_model_that_can_be_trained(model):
    """Scoring too."""
    model.score_tokens(RAGGED)
    model.score_continuations(RAGGED, [[[5, 6], [7]]] * 3)
    can_be_trained(model)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in KNOWN])
def test_no_family_keeps_a_tensor_of_a_run(family):
    """Buffers and attributes of all modules are ordinary after a run, and gradients flow."""
    model = with_llama_generation(copy.deepcopy(build(family)))
    for _ in range(2):
        model.generate([[1, 5, 6], [1, 7, 8]], max_gen_len=2, prompt_cache=PromptCache())
    model.score_tokens([[1, 5, 6, 9]])
    kept = [item for module in model.modules() for item in vars(module).values() if isinstance(item, torch.Tensor)]
    assert not any(tensor.is_inference() for tensor in [*kept, *model.buffers(), *model.parameters()])
    model(input_ids=torch.tensor([[1, 5, 6, 9]])).logits.sum().backward()


WATCHERS = ["hook", "hook before", "processor", "criterion", "streamer", "class", "forward", "mode"]


@pytest.mark.parametrize("watch", WATCHERS)
def test_whoever_is_called_gets_ordinary_tensors(model, modes, watch):
    """A hook, a processor, a criterion, a streamer, a module, a mode: each may keep what it is given. Only what is
    called inside the forward keeps it from running under the mode."""
    kept, asked, mode = [], {}, contextlib.nullcontext()

    def keep(*values):
        kept.extend(value for value in values if isinstance(value, torch.Tensor))

    class Keeps(transformers.generation.BaseStreamer, transformers.StoppingCriteria):
        def put(self, value):
            keep(value)

        def end(self):
            pass

        def __call__(self, ids, scores, **kwargs):
            keep(ids)
            return torch.zeros(len(ids), dtype=torch.bool)

    class Mine(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            keep(hidden)
            return self.inner(hidden)

    class Sees(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            keep(result := func(*args, **(kwargs or {})))
            return result

    layer = model.model.layers[1].mlp
    if watch == "hook":
        layer.register_forward_hook(lambda module, args, output: keep(output))
    elif watch == "hook before":
        layer.register_forward_pre_hook(lambda module, args: keep(*args))
    elif watch == "class":
        model.model.layers[1].mlp = Mine(layer)
    elif watch == "forward":
        original = layer.forward
        layer.forward = lambda hidden: (keep(hidden), original(hidden))[1]
    elif watch == "mode":
        mode = Sees()
    elif watch == "processor":
        asked["logits_processor"] = [lambda ids, scores: (keep(ids, scores), scores)[1]]
    else:
        asked["streamer" if watch == "streamer" else "stopping_criteria"] = (
            Keeps() if watch == "streamer" else [Keeps()]
        )
    with mode:
        model.generate([LONG], max_gen_len=3, eos_token_id=[], **asked)
    assert all_ordinary(kept)
    called_by_the_loop = watch in ("processor", "criterion", "streamer")
    assert len(modes) >= 3 and set(modes) == {called_by_the_loop}


@pytest.mark.parametrize("change", ["train", "eval"])
def test_training_goes_on_between_calls(model, change):
    """Samples in the middle of training, and after a step."""
    getattr(model, change)()
    for _ in range(2):
        model.generate([LONG], max_gen_len=2)
        can_be_trained(model)


def test_a_caller_under_inference_mode(model, modes):
    """The caller's own mode is left as it is, inside and after."""
    with torch.inference_mode():
        out = model.generate([LONG], max_gen_len=3, temperature=0)
        assert torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled() and all(modes)
    assert model.generate([LONG], max_gen_len=3, temperature=0).tokens == out.tokens
