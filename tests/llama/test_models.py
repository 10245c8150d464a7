"""Models of other kinds behind `Llama`: what their configs leave out, how long they read, how they are wrapped."""

import pytest
import torch
import transformers

from hf_llama_sampling import Llama, with_llama_generation
from tests.conftest import TINY, compiles_forwards
from tests.llama.test_reference_model import FAMILIES, Ids


@pytest.fixture
def gpt2():
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(FAMILIES["gpt2"]).eval()


@pytest.mark.parametrize(
    "config",
    [
        transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64),
        transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    ],
    ids=["xlnet says -1", "mamba says nothing", "bloom says nothing"],
)
def test_a_model_that_names_no_context_needs_a_limit(config):
    """The sentence asks for `max_seq_len`, and with it the model answers."""
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="max_seq_len must be given: the model's config names no context length"):
        Llama(model, Ids())
    assert len(Llama(model, Ids(), max_seq_len=32).generate([[1, 5, 6]], 4, 0.0)[0][0]) <= 4


def test_a_table_of_positions_is_a_limit_that_cannot_be_raised(gpt2):
    """GPT-2 learned its 64 positions one by one: more are refused where they are asked for, not in the middle."""
    with pytest.raises(ValueError, match="the 64 positions that GPT2LMHeadModel has a table of, got 65"):
        Llama(gpt2, Ids(), max_seq_len=65)
    with pytest.raises(ValueError, match=r"with its new tokens must not exceed the 64 positions .*, got 72"):
        with_llama_generation(gpt2).generate([[1, 5]], max_gen_len=70, max_seq_len=128)
    llama = Llama(gpt2, Ids())
    assert llama.max_seq_len == 64 and len(llama.generate([[1] * 60], 10, 0.0)[0][0]) <= 4


def test_rotary_positions_can_be_raised(tiny_model):
    """The bundled model's config says 512, and no table holds it to that."""
    assert Llama(tiny_model, str(TINY), max_seq_len=2048).max_seq_len == 2048


def test_an_encoder_decoder_is_refused_for_what_it_is():
    """Not for a limit that its config does not name."""
    config = transformers.T5Config(vocab_size=64, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8)
    with pytest.raises(ValueError, match="needs a decoder-only model"):
        Llama(transformers.T5ForConditionalGeneration(config), Ids())


@pytest.mark.parametrize("model", ["llama-2-7b", TINY, None, 5, transformers.LlamaForCausalLM, torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model):
    """A name is not loaded here: the sentence says where it is."""
    with pytest.raises(TypeError, match=r"Llama takes a model of transformers, got .*Llama\.build\(ckpt_dir"):
        Llama(model, str(TINY))


@compiles_forwards
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.compile looks at each attribute of a model
def test_a_compiled_model_answers_as_the_model_itself():
    """`torch.compile` hands out another object around the same weights."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    want = Llama(plain, str(TINY)).generate([[1, 870]], 6, 0.0)
    compiled = torch.compile(plain, backend="eager", dynamic=True)
    assert Llama(compiled, str(TINY)).generate([[1, 870]], 6, 0.0) == want


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks for an attribute by its older name
def test_a_model_of_peft_answers_as_the_model_itself():
    """PEFT too hands out another object around the same weights."""
    peft = pytest.importorskip("peft")
    plain = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    want = Llama(plain, str(TINY)).generate([[1, 870]], 6, 0.0)
    lora = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    adapted = Llama(lora, str(TINY))
    assert adapted.generate([[1, 870]], 6, 0.0) == want  # an adapter that is not trained changes nothing
    assert adapted.model.forward(torch.tensor([[1, 870]]), 0).shape == (1, 2, 1024)
