"""A run is taken up only by the model and the tokenizer that began it."""

import pytest
import torch
import transformers

from hf_llama_sampling import Llama, LlamaForCausalLM
from hf_llama_sampling.batch import Refused
from hf_llama_sampling.batch.fingerprint import fingerprint
from tests.batch.helpers import ask_all, some_records
from tests.conftest import TINY


def test_another_model_is_another_run(llama, tmp_path):
    """The weights are looked at, not only their name; the same ones offloaded are the same."""
    ask_all(llama, tmp_path, some_records(2))
    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight *= 1.001
    with pytest.raises(Refused, match="weights was"):
        ask_all(Llama(model, str(TINY)), tmp_path, some_records(2))
    half = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).eval()
    with pytest.raises(Refused, match="dtype was 'float32' and is 'bfloat16'"):
        ask_all(Llama(half, str(TINY)), tmp_path, some_records(2))
    offloaded = LlamaForCausalLM.from_pretrained(
        TINY,
        dtype=torch.float32,
        device_map={"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
        | {name: "disk" for name in ("model.layers", "model.norm")},
        offload_folder=tmp_path / "offload",
    ).eval()
    assert Llama(offloaded, str(TINY)).model.model.layers[0].mlp.down_proj.weight.device.type == "meta"
    ask_all(Llama(offloaded, str(TINY)), tmp_path, some_records(2))


@pytest.fixture
def own():
    """A model and a tokenizer that a test may change."""
    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    return Llama(model, transformers.AutoTokenizer.from_pretrained(TINY))


def changed(llama, change):
    """The parts of the fingerprint that a change shows in."""
    before = fingerprint(llama)
    change()
    after = fingerprint(llama)
    return {name for name in before if before[name] != after[name]}


def test_every_single_value_of_the_weights_counts(own):
    """The last bit of any value of any weight, first, last or between; the sign of a zero; two values exchanged."""
    weights = [weight for weight in own.model.parameters() if weight.numel() > 300]
    generator = torch.Generator().manual_seed(0)
    for weight in weights[:3] + weights[-3:]:
        values = weight.detach().view(-1)
        for at in (0, len(values) - 1, int(torch.randint(len(values), (1,), generator=generator))):
            bits = values[at : at + 1].view(torch.int32)
            assert changed(own, lambda bits=bits: bits.bitwise_xor_(1)) == {"weights"}
    norm = own.model.model.norm.weight.detach()
    norm[0] = 0.0
    assert changed(own, lambda: norm[0].neg_()) == {"weights"}
    norm[1], norm[2] = 0.25, 0.75
    assert changed(own, lambda: norm[1:3].copy_(norm[1:3].flip(0))) == {"weights"}


def test_buffers_count(own):
    """Saved ones, to the last bit, and those that are computed at loading."""
    own.model.model.register_buffer("bias", torch.zeros(4))
    assert changed(own, lambda: own.model.model.bias[3].fill_(1e-30)) == {"weights"}
    rotary = own.model.model.rotary_emb
    assert changed(own, lambda: rotary.inv_freq.mul_(1.01)) == {"weights"}


def test_rotary_factors_that_follow_the_text_do_not_count(tmp_path):
    """A forward over a long text changes them, and a run may be taken up in the same process."""
    config = transformers.AutoConfig.from_pretrained(TINY)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config.max_position_embeddings = 16
    llama = Llama(LlamaForCausalLM(config).float().eval(), str(TINY))
    before = llama.model.model.rotary_emb.inv_freq.clone()
    assert changed(llama, lambda: llama.model(torch.tensor([[5] * 40]))) == set()
    assert not torch.equal(before, llama.model.model.rotary_emb.inv_freq)


def test_adapters_count(own):
    """Their weights, which of them are on, and their strength."""
    peft = pytest.importorskip("peft")
    try:
        own.model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "one")
    except ValueError as error:
        if "version of PEFT you are using is not compatible" in str(error):
            pytest.skip(str(error))
        raise
    assert changed(own, lambda: own.model.disable_adapters()) == {"adapters"}
    assert changed(own, lambda: own.model.enable_adapters()) == {"adapters"}
    layer = own.model.model.layers[0].self_attn.q_proj
    assert changed(own, lambda: layer.scaling.update(one=3.0)) == {"adapters"}
    with torch.no_grad():
        assert changed(own, lambda: layer.lora_A["one"].weight[0, 0].add_(1)) == {"weights"}


def test_the_tokenizer_counts(own):
    """Its tokens, its merges, its chat template, what is special; not what a call of it sets."""
    tokenizer = own.tokenizer.tokenizer
    assert changed(own, lambda: tokenizer(["a", "b c"], truncation=True, max_length=4)) == set()
    for change in (
        lambda: setattr(tokenizer, "chat_template", "{{ messages }}"),
        lambda: setattr(tokenizer, "split_special_tokens", True),
        lambda: tokenizer.add_special_tokens({"additional_special_tokens": ["the"]}),
    ):
        assert "tokenizer" in changed(own, change)


def test_a_sentencepiece_file_counts(tiny_model):
    """Two files that encode the probe alike are still two; the same file twice is one."""
    llama = Llama(tiny_model, str(TINY / "tokenizer.model"))
    same = Llama(tiny_model, str(TINY / "tokenizer.model"))
    assert fingerprint(llama) == fingerprint(same)
    pieces = llama.tokenizer.sp_model.serialized_model_proto()
    llama.tokenizer.sp_model.load_from_serialized_proto(pieces.replace(b"king", b"kign", 1))
    assert fingerprint(llama)["tokenizer"] != fingerprint(same)["tokenizer"]


def test_special_tokens_of_the_checkpoint_count(own):
    """An EOS that `generation_config` names ends answers, so another one is another run."""
    assert changed(own, lambda: setattr(own.model.generation_config, "eos_token_id", [2, 7])) == {"eos_token_id"}


def test_any_object_with_five_members_is_asked_what_it_does(golden_model):
    """Its texts for all ids and for a probe, since there is no file."""

    class Letters:
        n_words, bos_id, eos_id, pad_id, first = 26, -1, -1, -1, 97

        def encode(self, s, bos, eos):
            return [ord(letter) - 97 for letter in s if "a" <= letter <= "z"]

        def decode(self, ids):
            return "".join(chr(self.first + token) for token in ids)

    llama = Llama(golden_model, Letters())
    assert changed(llama, lambda: setattr(llama.tokenizer, "first", 65)) == {"tokenizer"}
