import gc
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from transformers import LlamaConfig, LlamaForCausalLM

from hf_llama_sampling.llama.checkpoint import is_meta_folder, load_meta_checkpoint
from tests.bounds import rounding

VOCAB, DIM, HEADS, LAYERS = 96, 64, 16, 2
IDS = torch.tensor([[1, 5, 90, 33, 7, 7, 2, 64], [1, 8, 3, 95, 12, 0, 41, 6]])

KEYS = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
BY_ROWS = ("output", "wq", "wk", "wv", "w1", "w3")
BY_COLUMNS = ("tok_embeddings", "wo", "w2")


def llama(*, kv_heads=HEADS, hidden=176, rope_theta=10000.0, dim=DIM, vocab=VOCAB, **options):
    """A transformers model with random weights, norms included. 176: 2/3 of 4 * 64 rounded up to a multiple of 16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=rope_theta,
        **options,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (0.2 if weight.dim() == 2 else 0.1) + (weight.dim() == 1))
    return model


def meta_rows(weight, heads):
    """Rows in Meta's order: of every head, row i of the first half, then row i of the second half, for every i."""
    size = weight.shape[0] // heads
    return weight[[h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]]


def meta_weights(model):
    """Meta's keys and layout, unsharded."""
    config, weights = model.config, {}
    for name, weight in model.state_dict().items():
        name = name.removesuffix(".weight")
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        key = f"layers.{layer[1]}.{KEYS[layer[2]]}" if layer else KEYS[name]
        if key.endswith("wq"):
            weight = meta_rows(weight, config.num_attention_heads)
        if key.endswith("wk"):
            weight = meta_rows(weight, config.num_key_value_heads)
        weights[f"{key}.weight"] = weight
    return weights


def shard_of(weights, i, n, *, embedding_dim=1):
    """What the i-th of n shards holds: tensors of their own, and the derived rope.freqs."""
    shard = {"rope.freqs": torch.ones(2)}
    for key, weight in weights.items():
        last = key.split(".")[-2]
        dim = 0 if last in BY_ROWS or (last == "tok_embeddings" and embedding_dim == 0) else 1
        shard[key] = (weight.chunk(n, dim)[i] if last in BY_ROWS + BY_COLUMNS else weight).clone()
    return shard


def params_of(model, **changes):
    config = model.config
    params = {"dim": config.hidden_size, "n_layers": LAYERS, "n_heads": HEADS, "multiple_of": 16, "norm_eps": 1e-5}
    params |= {"vocab_size": -1, "n_kv_heads": config.num_key_value_heads} | changes
    return {key: value for key, value in params.items() if value != "absent"}


def write(folder, model, *, shards=1, dtype=torch.float32, embedding_dim=1, save=None, **changes):
    """A folder in Meta's format; changes go into params.json, "absent" leaves a field out."""
    (folder / "params.json").write_text(json.dumps(params_of(model, **changes)))
    weights = {key: weight.to(dtype) for key, weight in meta_weights(model).items()}
    for i in range(shards):
        shard = shard_of(weights, i, shards, embedding_dim=embedding_dim)
        torch.save(shard, folder / f"consolidated.{i:02d}.pth", **(save or {}))
    return folder


def load(folder, **options):
    return load_meta_checkpoint(folder, **({"max_seq_len": 128} | options))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def generated(model):
    return model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None)


def assert_same_weights(model, expected):
    weights = model.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.state_dict().items())


# What is loaded


@pytest.mark.parametrize("kv_heads", [HEADS, 8], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("shards", [1, 2, 8])
def test_shards_become_the_model_they_were_written_from(shards, kv_heads, tmp_path):
    """Every weight is equal, the logits agree within float32 rounding, and greedy generation is the same."""
    original = llama(kv_heads=kv_heads)
    model = load(write(tmp_path, original, shards=shards))
    assert_same_weights(model, original)
    torch.testing.assert_close(logits(model), logits(original), atol=rounding(model), rtol=0)
    assert torch.equal(generated(model), generated(original))


def meta_logits(weights, ids, *, kv_heads, theta, eps=1e-5):
    """The published arithmetic on Meta's own layout: neighbouring rows of a head are a complex number, and rotate."""
    size, length = DIM // HEADS, len(ids)
    angles = torch.outer(torch.arange(length), theta ** -(torch.arange(0, size, 2) / size))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, size / 2)

    def norm(x, key):
        return weights[f"{key}.weight"] * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    def linear(x, key):
        return x @ weights[f"{key}.weight"].T

    def heads(x, key, rotate):
        y = linear(x, key).view(length, -1, size)
        if rotate:
            y = torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turns).flatten(-2)
        return y.repeat_interleave(HEADS // y.shape[1], dim=1).transpose(0, 1)  # (heads, T, size)

    x = weights["tok_embeddings.weight"][ids]
    future = torch.ones(length, length).triu(1).bool()
    for i in range(LAYERS):
        a = f"layers.{i}.attention"
        h = norm(x, f"{a}_norm")
        q, k, v = (heads(h, f"{a}.{w}", rotate) for w, rotate in (("wq", True), ("wk", True), ("wv", False)))
        scores = (q @ k.mT / size**0.5).masked_fill(future, -torch.inf).softmax(-1)
        x = x + linear((scores @ v).transpose(0, 1).flatten(1), f"{a}.wo")
        f = f"layers.{i}.feed_forward"
        h = norm(x, f"layers.{i}.ffn_norm")
        x = x + linear(torch.nn.functional.silu(linear(h, f"{f}.w1")) * linear(h, f"{f}.w3"), f"{f}.w2")
    return linear(norm(x, "norm"), "output")


@pytest.mark.parametrize("theta", [10000.0, 500.0])
@pytest.mark.parametrize("kv_heads", [HEADS, 8], ids=["multi-head", "grouped"])
def test_logits_are_those_of_metas_layout_computed_directly(kv_heads, theta, tmp_path):
    """The rotary layout is right in itself, not only the inverse of what the test writes."""
    original = llama(kv_heads=kv_heads)
    model = load(write(tmp_path, original, shards=2, **({} if theta == 10000.0 else {"rope_theta": theta})))
    expected = meta_logits(meta_weights(original), IDS[0], kv_heads=kv_heads, theta=theta)
    torch.testing.assert_close(logits(model)[0], expected, atol=rounding(model), rtol=0)


def test_embedding_divided_by_rows(tmp_path):
    """Later checkpoints divide the vocabulary, not the width, of the embedding: the shapes tell."""
    original = llama()
    assert_same_weights(load(write(tmp_path, original, shards=4, embedding_dim=0), vocab_size=VOCAB), original)


@pytest.mark.parametrize(("changes", "hidden"), [({"ffn_dim_multiplier": 1.3}, 224), ({"multiple_of": 256}, 256)])
def test_width_of_the_feed_forward_follows_from_params(changes, hidden, tmp_path):
    """int(1.3 * int(2/3 * 256)) = 221 rounds up to 224; 170 rounds up to 256."""
    original = llama(hidden=hidden)
    assert_same_weights(load(write(tmp_path, original, shards=2, **changes)), original)


@pytest.mark.parametrize(
    ("params", "hidden"),
    [
        ({"dim": 4096, "multiple_of": 256}, 11008),
        ({"dim": 5120, "multiple_of": 256}, 13824),
        ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),
    ],
    ids=["7B", "13B", "70B"],
)
def test_published_sizes(params, hidden, tmp_path):
    """The widths of the published models, found in the error about a file that has others."""
    model = llama()
    shard = {
        key: torch.empty(1).expand([params["dim"] if size == DIM else size for size in weight.shape])
        for key, weight in meta_weights(model).items()
    }
    torch.save(shard, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(params_of(model) | params))
    with pytest.raises(ValueError, match=re.escape(f"({hidden}, {params['dim']}) follows from params.json")):
        load(tmp_path)


def test_config_says_what_params_say(tmp_path):
    """The context length is the caller's; what params.json says of it is not the model's."""
    folder = write(
        tmp_path, llama(kv_heads=8), rope_theta=500.0, max_seq_len=7, max_batch_size=3, use_scaled_rope=False
    )
    config = load(folder, max_seq_len=99).config
    assert config.max_position_embeddings == 99
    assert (config.rms_norm_eps, config.num_key_value_heads, config.vocab_size) == (1e-5, 8, VOCAB)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)


def test_fields_that_may_be_absent(tmp_path):
    """Without n_kv_heads there are as many as heads; without vocab_size the embedding tells."""
    original = llama()
    assert_same_weights(load(write(tmp_path, original, n_kv_heads="absent", vocab_size="absent")), original)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_dtype(stored, tmp_path):
    """The stored dtype is kept unless another is asked for; the rotary table is float32 in any case."""
    original = llama().to(stored)
    folder = write(tmp_path, original, shards=2, dtype=stored)
    kept, cast = load(folder), load(folder, dtype=torch.float32)
    assert_same_weights(kept, original)
    assert_same_weights(cast, original.float())
    assert (kept.dtype, cast.dtype, kept.config.dtype) == (stored, torch.float32, stored)
    assert {buffer.dtype for buffer in kept.buffers()} == {torch.float32}


def test_model_class_and_mode(tmp_path):
    """A subclass of LlamaForCausalLM, ready for inference."""

    class Mine(LlamaForCausalLM):
        pass

    model = load(write(tmp_path, llama()), model_class=Mine)
    assert type(model) is Mine and not model.training


@pytest.mark.parametrize("key", ["rope.freqs", "layers.0.attention.inner_attention.rope.freqs"])
def test_rotary_frequencies_in_the_file_are_ignored(key, tmp_path):
    """They are derived from params.json, whatever the file says."""
    original = llama()
    write(tmp_path, original)
    torch.save(shard_of(meta_weights(original), 0, 1) | {key: torch.zeros(2)}, tmp_path / "consolidated.00.pth")
    assert torch.equal(logits(load(tmp_path)), logits(original))


def test_torchs_old_file_format(tmp_path):
    """A file that cannot be mapped into memory is read."""
    original = llama()
    folder = write(tmp_path, original, shards=2, save={"_use_new_zipfile_serialization": False})
    assert_same_weights(load(folder), original)


# Where it is loaded to


PLACEMENTS = {
    "cpu": "cpu",
    "a device": torch.device("cpu"),
    "auto": "auto",
    "sequential": "sequential",
    "disk": "disk",
    "mixed": {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    | {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device_map", PLACEMENTS.values(), ids=PLACEMENTS)
def test_placement_changes_nothing(device_map, dtype, tmp_path):
    """On the CPU, on disk or on both: the same logits and the same generation."""
    original = llama(kv_heads=8).to(dtype)
    original.model.rotary_emb = llama(kv_heads=8).model.rotary_emb  # `to` rounds its frequencies, loading does not
    model = load(write(tmp_path, original, shards=2, dtype=torch.float32), device_map=device_map, dtype=dtype)
    assert torch.equal(logits(model), logits(original))
    assert torch.equal(generated(model), generated(original))
    assert bool(model.hf_device_map)


def test_auto_with_too_little_memory_goes_to_disk(tmp_path):
    """max_memory bounds what stays; the rest lies in the offload folder."""
    original = llama()
    folder = tmp_path / "offload" / "new"
    (tmp_path / "meta").mkdir()
    source = write(tmp_path / "meta", original)
    model = load(source, device_map="auto", max_memory={"cpu": 300_000}, offload_folder=folder)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert (folder / "index.json").is_file()
    assert torch.equal(logits(model), logits(original))


def test_temporary_offload_folder_lives_as_long_as_the_model(tmp_path, monkeypatch):
    """No folder is left behind."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "meta").mkdir()
    model = load(write(tmp_path / "meta", llama()), device_map="disk")
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    del model
    gc.collect()
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(
    ("device_map", "words"), [("gpu", "'gpu' is none"), ({"model": "cpu"}, "lm_head.weight"), ({"": "gpu"}, "'gpu'")]
)
def test_a_wrong_placement_is_refused(device_map, words, tmp_path):
    """A name that is no device, a map that leaves a weight out."""
    with pytest.raises(ValueError, match=re.escape(words)):
        load(write(tmp_path, llama()), device_map=device_map)


def private_bytes():
    """Of the live tensors made since gc.freeze(), without those that are mapped from a shard."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines if line.endswith(".pth")]
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and o.device.type == "cpu"]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for at, size in sizes.items() if not any(start <= at < end for start, end in mapped))


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="/proc is Linux's")
@pytest.mark.parametrize("device_map", [None, "disk"])
@pytest.mark.parametrize("shards", [1, 8])
def test_no_second_copy_is_held(shards, device_map, tmp_path, monkeypatch):
    """While shards are merged and cast, memory holds the weights already placed and the one in hand, and no more."""
    write(tmp_path, llama(), shards=shards, dtype=torch.bfloat16)
    placed, held, in_hand = [0], [], []

    def place(model, name, device, value, **options):
        held.append(private_bytes() - placed[-1])
        in_hand.append(value.nbytes)
        placed.append(placed[-1] + (0 if device == "meta" else value.nbytes))
        set_module_tensor_to_device(model, name, device, value=value, **options)

    monkeypatch.setattr("hf_llama_sampling.llama.checkpoint.set_module_tensor_to_device", place)
    gc.freeze()
    try:
        model = load(tmp_path, dtype=torch.float32, device_map=device_map)
    finally:
        gc.unfreeze()
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert len(held) == 3 + 9 * LAYERS
    assert [more - buffers for more in held] == in_hand


# What is refused


def one_sentence(caught, *words):
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and ". " not in message


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", ["zip", "old format", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_is_not_run(save, tmp_path):
    """A pickle that would call something is refused in every file format; what it calls is named where torch tells."""
    ran = tmp_path / "ran"
    file = write(tmp_path, llama()) / "consolidated.00.pth"
    if save == "pickle":
        file.write_bytes(pickle.dumps({"norm.weight": Code(ran)}))
    else:
        torch.save({"norm.weight": Code(ran)}, file, _use_new_zipfile_serialization=save == "zip")
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth") as caught:
        load(tmp_path)
    one_sentence(caught, "nothing in it was run" if save == "pickle" else "getattr, which was not done")
    assert not ran.exists()


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", "half", "half old"])
def test_a_broken_file_is_refused(content, tmp_path):
    """Empty, a pointer instead of the file, cut short: the error names it."""
    file = tmp_path / "consolidated.01.pth"
    write(tmp_path, llama(), shards=2, save={"_use_new_zipfile_serialization": content != "half old"})
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth cannot be read as one"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [([1], "holds list"), ({"model": {}}, "'model' in .* type dict"), ({"norm.weight": torch.ones(3).int()}, "int32")],
)
def test_a_file_of_other_things_is_refused(content, words, tmp_path):
    """A shard is a dictionary of floating point tensors."""
    write(tmp_path, llama())
    torch.save(content, tmp_path / "consolidated.00.pth")
    with pytest.raises(ValueError, match=words):
        load(tmp_path)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_gap_in_the_numbers_is_a_missing_shard(number, tmp_path):
    """The error names the file."""
    write(tmp_path, llama(), shards=4)
    (tmp_path / f"consolidated.{number:02d}.pth").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path)
    one_sentence(caught, f"no consolidated.{number:02d}.pth", "copy")


def test_a_missing_last_shard_is_seen_in_the_shapes(tmp_path):
    """The numbers have no gap, but the weights are not whole."""
    write(tmp_path, llama(), shards=4)
    (tmp_path / "consolidated.03.pth").unlink()
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    one_sentence(caught, "4 shards, and 3 were found", "copy the missing")


@pytest.mark.parametrize("shards", [1, 2])
def test_a_shard_too_many(shards, tmp_path):
    """One more of the same shape."""
    write(tmp_path, llama(), shards=shards)
    extra = tmp_path / f"consolidated.{shards:02d}.pth"
    extra.write_bytes((tmp_path / "consolidated.00.pth").read_bytes())
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    one_sentence(caught, f"{shards} shard{'s' * (shards > 1)}, and {shards + 1} were found", "move")


@pytest.mark.parametrize("name", ["consolidated.0.pth", "consolidated.best.pth", "consolidated.00.copy.pth"])
def test_a_file_without_a_number_of_its_own(name, tmp_path):
    """It is not known which shard it would be."""
    write(tmp_path, llama())
    (tmp_path / name).write_bytes((tmp_path / "consolidated.00.pth").read_bytes())
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    one_sentence(caught, "each once", "consolidated.0")


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("layers.1.attention.wk.weight", (31, 64)),
        ("layers.1.attention.wq.weight", (32, 63)),
        ("layers.0.feed_forward.w2.weight", (64, 80)),
        ("layers.0.attention_norm.weight", (63,)),
        ("tok_embeddings.weight", (96, 31)),
        ("tok_embeddings.weight", (7,)),
        ("output.weight", (96, 64)),
        ("layers.0.attention.wq.weight", (0, 64)),
    ],
)
@pytest.mark.parametrize("shard", [0, 1])
def test_a_wrong_shape_is_named(key, shape, shard, tmp_path):
    """The error gives the key, the file, the shape found and the shape expected."""
    write(tmp_path, llama(), shards=2)
    file = tmp_path / f"consolidated.{shard:02d}.pth"
    torch.save(torch.load(file) | {key: torch.ones(shape)}, file)
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    one_sentence(caught, f"{key} has shape {shape} in {file.name}", "follows from params.json and 2 shards")


def test_shards_of_two_models_are_told_apart(tmp_path):
    """Shapes agree, norms do not."""
    model = llama()
    write(tmp_path, model, shards=2)
    file = tmp_path / "consolidated.01.pth"
    torch.save(torch.load(file) | {"norm.weight": torch.ones(DIM) * 3}, file)
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    one_sentence(caught, "norm.weight differs between consolidated.00.pth and consolidated.01.pth")


def test_a_missing_and_an_unexpected_key_are_named(tmp_path):
    """Also where params.json has another number of layers than the shards."""
    write(tmp_path, llama(), shards=2)
    file = tmp_path / "consolidated.01.pth"
    shard = torch.load(file)
    torch.save({key: weight for key, weight in shard.items() if key != "layers.1.attention.wo.weight"}, file)
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    one_sentence(caught, "consolidated.01.pth lacks layers.1.attention.wo.weight:")
    torch.save(shard | {"layers.0.attention.wq.bias": torch.ones(3)}, file)
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    one_sentence(caught, "consolidated.01.pth also has layers.0.attention.wq.bias:")


@pytest.mark.parametrize(("layers", "words"), [(3, "lacks layers.2"), (1, "also has layers.1")])
def test_another_number_of_layers(layers, words, tmp_path):
    """params.json and shards are of different models."""
    with pytest.raises(ValueError, match=rf"{words}\.\S+ and 8 more"):
        load(write(tmp_path, llama(), n_layers=layers))


@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize(
    ("inside", "given", "words"), [(-1, 95, "the tokenizer says 95"), (97, 96, "params.json says 97")]
)
def test_a_vocabulary_of_another_size(embedding_dim, inside, given, words, tmp_path):
    """The tokenizer's size and params.json's are compared with the rows of the embedding."""
    folder = write(tmp_path, llama(), shards=2, embedding_dim=embedding_dim, vocab_size=inside)
    with pytest.raises(ValueError) as caught:
        load(folder, vocab_size=given)
    one_sentence(caught, f"it has 96 where {words}")


def test_more_shards_than_key_value_heads(tmp_path):
    """Shards hold whole heads: Meta's own code cannot run half of one."""
    with pytest.raises(ValueError) as caught:
        load(write(tmp_path, llama(kv_heads=4), shards=8))
    one_sentence(caught, "n_kv_heads is a multiple of the number of shards", "4 is none of 8")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": "absent"}, ["lacks dim"]),
        ({"norm_eps": None}, ["lacks norm_eps"]),
        ({"n_layers": 0}, ["n_layers is a positive integer", "0"]),
        ({"n_heads": 4.0}, ["n_heads is a positive integer", "4.0"]),
        ({"n_kv_heads": 5}, ["multiple of n_kv_heads", "16", "5"]),
        ({"n_heads": 6}, ["multiple of twice n_heads", "64", "6"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
        ({"norm_eps": "1e-5"}, ["norm_eps is a positive number", "'1e-5'"]),
        ({"norm_eps": float("nan")}, ["norm_eps is a positive number", "nan"]),
        ({"rope_theta": -1}, ["rope_theta is a positive number", "-1"]),
        ({"use_scaled_rope": True}, ["use_scaled_rope", "True", "transformers folder"]),
        ({"moe": {"num_experts": 8}}, ["moe", "num_experts"]),
        ({"ffn_dim_multiplier": 1.3}, ["feed_forward.w1", "(176, 64)", "(224, 64)"]),
        ({"multiple_of": 256}, ["feed_forward.w1", "(176, 64)", "(256, 64)"]),
    ],
)
def test_wrong_params_are_refused(changes, words, tmp_path):
    """Missing fields, values out of range, what would change the arithmetic, what contradicts the shards."""
    with pytest.raises(ValueError) as caught:
        load(write(tmp_path, llama(), **changes))
    one_sentence(caught, *words)


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_params_that_are_no_json_object(content, tmp_path):
    """The error names the file."""
    write(tmp_path, llama())
    (tmp_path / "params.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"params\.json is a JSON file|params\.json holds one JSON object"):
        load(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    """No folder, an empty folder, no params.json, no shard."""
    with pytest.raises(FileNotFoundError, match="is none"):
        load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="is empty"):
        load(tmp_path)
    write(tmp_path, llama())
    (tmp_path / "params.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(FileNotFoundError, match=r"holds a params\.json"):
        load(tmp_path)
    (tmp_path / "elsewhere.json").rename(tmp_path / "params.json")
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"no such file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], False),
        (["consolidated.00.pth", "params.json"], True),
        (["consolidated.00.pth"], True),
        (["params.json"], True),
        (["config.json", "model.safetensors"], False),
        (["config.json", "params.json", "consolidated.safetensors"], False),
        (["config.json", "params.json", "consolidated.00.pth"], True),
    ],
)
def test_a_meta_folder_is_told_from_a_transformers_folder(names, expected, tmp_path):
    """A broken one counts too, so that its error can be a clear one."""
    for name in names:
        (tmp_path / name).touch()
    assert is_meta_folder(tmp_path) is is_meta_folder(str(tmp_path)) is expected
    assert not is_meta_folder(tmp_path / "missing")
