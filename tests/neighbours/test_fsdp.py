"""torch's wrappers for training: FSDP's sharded models, and DistributedDataParallel."""

import pytest
import torch
import transformers
from torch.distributed.fsdp import fully_shard

from hf_llama_sampling import Llama, LlamaForCausalLM, with_llama_generation
from tests.conftest import TINY
from tests.generation.helpers import RAGGED


@pytest.fixture(scope="module")
def group():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shards no model on a CPU")
@pytest.mark.parametrize("model_class", [LlamaForCausalLM, transformers.LlamaForCausalLM])
def test_a_sharded_model_answers_as_before(tiny_model, group, model_class):
    """`fully_shard` gives a model a class that cannot be called; our class and a twin answer all the same."""
    model = model_class.from_pretrained(TINY, dtype="float32")
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=group)
    sharded = with_llama_generation(model)
    asked = {"max_gen_len": 5, "seeds": 3}
    assert sharded.generate(RAGGED, **asked).tokens == tiny_model.generate(RAGGED, **asked).tokens
    assert sharded.score_tokens(RAGGED).totals == pytest.approx(tiny_model.score_tokens(RAGGED).totals, abs=1e-3)


def test_a_wrapped_model_is_refused_with_the_way_out(tiny_model, group):
    """The model inside is asked, not the wrapper."""
    wrapped = torch.nn.parallel.DistributedDataParallel(LlamaForCausalLM.from_pretrained(TINY, dtype="float32"))
    for take in (with_llama_generation, lambda model: Llama(model, None)):
        with pytest.raises(TypeError, match=r"DistributedDataParallel wraps a model .* its attribute module"):
            take(wrapped)
    assert with_llama_generation(wrapped.module) is wrapped.module


def test_processes_that_go_in_step_forward_equally_often(tiny_model, group):
    """Where `synced_gpus` says so nothing is shared: another process may have nothing to share, and would wait."""
    forwards = []
    hook = tiny_model.register_forward_hook(lambda *_: forwards.append(1))
    try:
        for prompts in ([[1, 5, 6] * 30] * 4, [[one, 5, 6] * 30 for one in range(4)]):
            tiny_model.generate(
                prompts, max_gen_len=2, temperature=0, eos_token_id=[], synced_gpus=True, share_prefix=True
            )
    finally:
        hook.remove()
    assert len(forwards) == 4
