"""`Llama.model`: the reference's forward by position, its fields, and the transformers model that it stays."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers

from hf_llama_sampling import Llama, LlamaForCausalLM
from tests.conftest import TINY

pytestmark = pytest.mark.slow

IDS = torch.tensor([[1, 870, 988, 13, 300, 44, 561, 90], [1, 411, 21, 987, 3, 300, 870, 5]])


@pytest.fixture
def plain():
    """A model of transformers' own class, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture
def llama(plain):
    return Llama(plain, str(TINY), max_seq_len=64)


def bound(logits: torch.Tensor) -> float:
    """256 float32 steps at the size of the largest logit: the same sums in another order, layer upon layer."""
    return 256 * 2.0**-23 * float(logits.abs().max())


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape and got.dtype == torch.float32
    want = want.detach()
    assert float((got - want).abs().max()) <= bound(want)


SMALL = {"vocab_size": 64, "max_position_embeddings": 64}
FAMILIES = {
    "gpt2": transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "opt": transformers.OPTConfig(**SMALL, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4),
    "bloom": transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "mistral": transformers.MistralConfig(
        **SMALL,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
    ),
}


# forward(tokens, start_pos)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.forward(IDS, 0),
        lambda model: model(IDS, 0),
        lambda model: model(IDS, start_pos=0),
        lambda model: model.forward(tokens=IDS, start_pos=torch.tensor(0)),
        lambda model: model(input_ids=IDS, start_pos=0),
        lambda model: model(IDS.tolist(), 0),
    ],
)
def test_forward_answers_with_float32_logits(llama, plain, call):
    """However a script spells the call: (B, T, V) logits of a plain forward, without a graph."""
    logits = call(llama.model)
    assert_close(logits, plain(IDS).logits)
    assert not logits.requires_grad


def test_logits_are_float32_whatever_the_weights(llama):
    """As the reference's `.float()`."""
    half = Llama(llama.model.to(torch.bfloat16), llama.tokenizer)
    assert half.model.forward(IDS, 0).dtype == torch.float32


@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_calls_go_on_where_the_last_one_ended(llama, family):
    """Chunk by chunk and token by token, the logits of one whole forward; 0 starts anew."""
    model, ids = llama.model, IDS
    if family is not None:
        torch.manual_seed(1)
        other = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
        model, ids = Llama(other, Ids(), max_seq_len=64).model, IDS % 60 + 3
    want = model.forward(ids, 0)
    for sizes in ([3, 5], [1] * 8, [7, 1]):
        at, parts = 0, []
        for size in sizes:
            parts.append(model.forward(ids[:, at : at + size], at))
            at += size
        assert_close(torch.cat(parts, 1), want)


def test_a_start_pos_in_between_goes_back(llama, plain):
    """A text may be taken up again from any position that was read, with other tokens than before."""
    other = torch.cat([IDS[:, :3], IDS[:, 5:]], 1)
    llama.model.forward(IDS, 0)
    assert_close(llama.model.forward(other[:, 3:], 3), plain(other).logits[:, 3:])


def test_the_first_rows_may_go_on_alone(llama, plain):
    """As in the reference, whose cache holds `max_batch_size` rows."""
    llama.model.forward(IDS[:, :4], 0)
    assert_close(llama.model.forward(IDS[:1, 4:], 4), plain(IDS[:1]).logits[:, 4:])
    with pytest.raises(ValueError, match="2 go on at start_pos=4 where 1 were begun"):
        llama.model.forward(IDS[:, 4:], 4)


def test_sampling_by_hand_equals_generate(llama):
    """A script's own greedy loop over `model.forward` gives the tokens of `generate`."""
    tokens = [1, 870]
    logits = llama.model.forward(torch.tensor([tokens]), 0)
    for _ in range(6):
        tokens.append(int(logits[0, -1].argmax()))
        logits = llama.model.forward(torch.tensor([tokens[-1:]]), len(tokens) - 1)
    assert llama.generate([[1, 870]], 6, temperature=0.0, echo=True)[0] == [tokens]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda m: m.forward(IDS, 9), ValueError, "got 9 after 0"),
        (lambda m: m.forward(IDS, -1), ValueError, "start_pos must be at least 0, got -1"),
        (lambda m: m.forward(IDS, start_pos="0"), TypeError, "start_pos must be an int, got '0'"),
        (lambda m: m.forward(IDS, start_pos=True), TypeError, "start_pos must be an int, got True"),
        (lambda m: m.forward(IDS + 4000, 0), ValueError, "must lie in [0, 1024), got 4001"),
        (lambda m: m.forward(IDS - 5, 0), ValueError, "must lie in [0, 1024), got -4"),
        (lambda m: m.forward(IDS[0], 0), ValueError, "a single text is tokens[None]"),
        (lambda m: m.forward(IDS.float(), 0), ValueError, "token ids of shape (B, T)"),
        (lambda m: m.forward(IDS[:, :0], 0), ValueError, "of shape (2, 0)"),
        (lambda m: m.forward(IDS.repeat(1, 9), 0), ValueError, "max_seq_len=64"),
        (lambda m: m.forward(tokens=IDS), TypeError, "tokens and start_pos alone"),
        (lambda m: m.forward(IDS, start_pos=0, use_cache=True), TypeError, "tokens and start_pos alone"),
    ],
)
def test_a_wrong_call_is_one_sentence(llama, call, kind, words):
    """The rule and the value."""
    with pytest.raises(kind) as error:
        call(llama.model)
    assert words in str(error.value) and "\n" not in str(error.value)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
    "original_max_position_embeddings": 16,
    "factor": 32.0,
}
WITHOUT_A_CACHE_TO_GO_ON = {
    "sliding": FAMILIES["mistral"],
    "recurrent": transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
    "longrope": transformers.LlamaConfig(
        **SMALL,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        rope_parameters=LONGROPE,
    ),
}


@pytest.mark.parametrize("kind", WITHOUT_A_CACHE_TO_GO_ON)
def test_where_a_cache_cannot_tell_the_whole_text_is_read_again(kind):
    """A full window that goes back, a recurrent state, rotary factors that change with the length: never wrong."""
    torch.manual_seed(1)
    plain = transformers.AutoModelForCausalLM.from_config(WITHOUT_A_CACHE_TO_GO_ON[kind]).eval()
    model, ids = Llama(plain, Ids(), max_seq_len=64).model, torch.arange(3, 43)[None]
    want = model.forward(ids, 0)
    model.forward(ids[:, :30], 0)
    assert_close(model.forward(ids[:, 12:], 12), want[:, 12:])
    assert_close(model.forward(ids[:, 39:], 39), want[:, 39:])
    parts = [model.forward(ids[:, at : at + 5], at) for at in range(0, 40, 5)]
    assert_close(parts[-1], want[:, 35:])


def test_a_forward_that_drops_the_cache_is_noticed(plain):
    """A wrapper that forgets what came before answers as if each call were the whole text: it is read again."""
    inner = plain.forward
    plain.forward = lambda *args, past_key_values=None, **kwargs: inner(*args, **kwargs)
    model = Llama(plain, str(TINY)).model
    want = model.forward(IDS, 0)
    model.forward(IDS[:, :4], 0)
    assert_close(model.forward(IDS[:, 4:], 4), want[:, 4:])


def test_going_on_reads_new_tokens_alone(llama):
    """But for one comparison with the whole text, for single tokens and for several."""
    widths = []
    inner = llama.model.forward
    llama.model.forward = lambda *args, **kwargs: widths.append(kwargs["input_ids"].shape[1]) or inner(*args, **kwargs)
    for start, width in ((0, 2), (2, 2), (4, 2), (6, 1), (7, 1), (3, 2)):
        llama.model.forward(IDS[:, start : start + width], start)
    assert widths == [2, 2, 4, 2, 1, 7, 1, 2]


# The model that it stays


def test_transformers_own_calls_work_as_before(llama, plain):
    """By position, by keyword and with a mask: transformers' output; the signature is the model's own."""
    want = plain(IDS).logits
    for output in (llama.model(IDS), llama.model(input_ids=IDS), llama.model(IDS, torch.ones_like(IDS))):
        assert torch.equal(output.logits, want) and output.past_key_values is not None
    assert list(inspect.signature(llama.model.forward).parameters) == list(inspect.signature(plain.forward).parameters)


def test_generate_and_forward_by_position_do_not_disturb_each_other(llama):
    """A run between two calls changes neither its own tokens nor the calls' logits."""
    want = llama.model.forward(IDS, 0)
    alone = llama.generate([[1, 870]], 8, temperature=0.0)
    llama.model.forward(IDS[:, :4], 0)
    assert llama.generate([[1, 870]], 8, temperature=0.0) == alone
    assert_close(llama.model.forward(IDS[:, 4:], 4), want[:, 4:])


def test_the_callers_model_is_left_as_it_is(plain):
    """Neither class, nor attributes, nor forward of the model given change; its weights are shared."""
    before, kind = set(vars(plain)), type(plain)
    llama = Llama(plain, str(TINY), max_seq_len=64)
    llama.model.forward(IDS, 0)
    assert set(vars(plain)) == before and type(plain) is kind
    assert llama.model.lm_head.weight is plain.lm_head.weight
    assert not hasattr(plain, "params") and plain(IDS).logits is not None


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_answer_like_the_original(llama, again):
    """A copy has the interface, the limit, and the weights that a copy of its kind has."""
    want = llama.model.forward(IDS, 0)
    twin = again(llama.model)
    assert torch.equal(twin.forward(IDS, 0), want)
    assert isinstance(twin, transformers.LlamaForCausalLM) and twin.params.max_seq_len == 64
    assert twin.generate([[1, 870]], max_gen_len=3, temperature=0).tokens


def test_a_forward_set_on_the_model_is_kept(plain):
    """A wrapper that somebody put around the caller's model, or puts around ours, is called."""
    calls = []
    inner = plain.forward
    plain.forward = lambda *args, **kwargs: calls.append("theirs") or inner(*args, **kwargs)
    llama = Llama(plain, str(TINY), max_seq_len=64)
    llama.model.forward(IDS, 0)
    assert calls == ["theirs"]
    ours = llama.model.forward
    llama.model.forward = lambda *args, **kwargs: calls.append("ours") or ours(*args, **kwargs)
    llama.model(IDS, 0)
    assert calls == ["theirs", "ours", "theirs"]


def test_a_llama_of_a_llamas_model(llama):
    """`Llama(other.model, ...)` has its own params and cache."""
    other = Llama(llama.model, llama.tokenizer, max_seq_len=32)
    assert (other.model.params.max_seq_len, llama.model.params.max_seq_len) == (32, 64)
    llama.model.forward(IDS, 0)
    with pytest.raises(ValueError, match="after 0"):
        other.model.forward(IDS, 8)


def test_saving_writes_the_models_own_class(llama, tmp_path):
    """`save_pretrained` of `Llama.model` is loaded by transformers as what it was."""
    llama.model.save_pretrained(tmp_path)
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) is transformers.LlamaForCausalLM


# Names of the reference's modules


def test_modules_for_hooks_have_the_references_names(llama, plain):
    """`layers`, `tok_embeddings`, `norm` and `output` are the model's own modules; a hook on one is called."""
    model = llama.model
    assert model.layers is plain.model.layers and len(model.layers) == model.n_layers == 4
    assert model.tok_embeddings is plain.model.embed_tokens
    assert (model.norm, model.output) == (plain.model.norm, plain.lm_head)
    seen = []
    with model.layers[0].register_forward_hook(lambda *_: seen.append(1)):
        model.forward(IDS, 0)
    assert seen == [1]


def test_a_name_that_the_architecture_lacks_is_one_sentence():
    """GPT-2 has no `layers`; `hasattr` and other missing names behave as everywhere."""
    model = Llama(transformers.GPT2LMHeadModel(FAMILIES["gpt2"]).eval(), Ids(), max_seq_len=32).model
    with pytest.raises(AttributeError, match=r"GPT2LMHeadModel has no layers .* hook a module of model\.named_modules"):
        _ = model.layers
    assert not hasattr(model, "norm") and model.output is model.lm_head
    with pytest.raises(AttributeError, match="nonsense"):
        _ = model.nonsense


# One limit


def test_one_limit_for_all(plain):
    """`max_seq_len` raises or lowers the limit of generate, score_tokens and forward alike."""
    text = [1, *[5] * 700]
    large, small = Llama(plain, str(TINY), max_seq_len=2048), Llama(plain, str(TINY), max_seq_len=64)
    assert len(large.generate([text], 2)[0][0]) <= 2
    assert len(large.model.generate([text], max_gen_len=2).tokens[0]) <= 2
    assert len(large.model.score_tokens([text]).logprobs[0]) == 701
    assert large.model.forward(torch.tensor([text]), 0).shape[1] == 701
    for call in (
        lambda: small.generate([text], 2),
        lambda: small.model.generate([text], max_gen_len=2),
        lambda: small.model.score_tokens([text]),
        lambda: small.model.forward(torch.tensor([text]), 0),
    ):
        with pytest.raises(ValueError, match="64"):
            call()


class Ids:
    """A tokenizer of 64 ids, for models that read no text here."""

    n_words, bos_id, eos_id, pad_id = 64, 1, 2, -1

    def encode(self, s, bos, eos):
        return [1] * bos + [ord(c) % 60 + 3 for c in s] + [2] * eos

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_params_name_what_a_script_reads(tiny_model):
    """The fields of the reference's ModelArgs, for each `Llama` its own."""
    params = Llama(tiny_model, str(TINY), max_seq_len=64, max_batch_size=4).model.params
    assert (params.dim, params.n_layers, params.n_heads, params.n_kv_heads, params.vocab_size) == (192, 4, 6, 2, 1024)
    assert (params.max_seq_len, params.max_batch_size, params.norm_eps) == (64, 4, 1e-5)
    assert isinstance(tiny_model, LlamaForCausalLM) and not hasattr(tiny_model, "params")
