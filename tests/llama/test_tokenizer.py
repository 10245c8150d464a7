import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from hf_llama_sampling.llama.loading import load_tokenizer
from hf_llama_sampling.llama.tokenizer import Tokenizer, TokenizerLike, TransformersTokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "completion.json").read_text(encoding="utf-8"))

TEXTS = [
    "The capital of France is",
    "",
    " ",
    "   three leading, two trailing  ",
    "tab\tnewline\nreturn\r\nform\ffeed\u00a0no-break\u2003em\u200bzero",
    "Ελληνικά עברית العربية हिन्दी ไทย 日本語 한국어 中文 Кириллица አማርኛ",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \ufeff \U0001f9ff",
    "<s> </s> <unk> <0x0A> ▁",
    "\x00\x01\x7f",
]


@pytest.fixture(scope="module")
def llama(llama_tokenizer_path):
    return Tokenizer(llama_tokenizer_path)


@pytest.fixture(scope="module")
def sentencepiece(llama_tokenizer_path):
    return SentencePieceProcessor(model_file=str(llama_tokenizer_path))


def byte_level(**special_tokens):
    """A transformers tokenizer with one token per byte and the special tokens given, in the manner of GPT-2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **special_tokens)


# SentencePiece


def test_members_are_the_models(llama):
    """Sizes and ids as in LLAMA2's own file, which has no pad piece."""
    assert (llama.n_words, llama.bos_id, llama.eos_id, llama.pad_id) == (32000, 1, 2, -1)


@pytest.mark.parametrize("row", range(len(GOLDEN["text"]["prompts"])))
def test_encode_is_the_references(row, llama):
    """Every recorded text becomes the ids that reached the reference's generate."""
    ids = llama.encode(GOLDEN["text"]["prompts"][row], bos=True, eos=False)
    assert ids == GOLDEN["text"]["prompt_tokens"][row]


@pytest.mark.parametrize("row", range(len(GOLDEN["text"]["predictions"])))
def test_decode_is_the_references(row, llama):
    """Recorded ids become the recorded text, and one by one the recorded token strings."""
    ids, prediction = GOLDEN["generated"][row % 3], GOLDEN["text"]["predictions"][row]
    assert llama.decode(ids) == prediction["generation"]
    assert [llama.decode(i) for i in ids] == prediction["tokens"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_encoded_and_decoded_as_by_sentencepiece(text, llama, sentencepiece):
    """Other scripts, odd white space, emoji, control characters: the same ids, text and token strings."""
    ids = sentencepiece.encode(text)
    assert llama.encode(text, bos=False, eos=False) == ids
    assert llama.encode(text, bos=True, eos=True) == [1, *ids, 2]
    assert llama.decode(ids) == sentencepiece.decode(ids)
    assert [llama.decode(i) for i in ids] == [sentencepiece.decode([i]) for i in ids]


def test_control_tokens_are_not_spelled_and_not_shown(llama):
    """Text never becomes a control token, and a control token never becomes text."""
    assert not {0, 1, 2} & set(llama.encode("<s> </s> <unk>", bos=False, eos=False))
    assert llama.decode([1, 415, 5565, 2]) == "The capital"


def test_bytes_are_joined_into_characters(llama):
    """Byte pieces decode together to the character and alone to the replacement character."""
    ids = [3 + byte for byte in "你".encode()]
    assert llama.decode(ids) == "你"
    assert [llama.decode(i) for i in ids] == ["\ufffd"] * 3


def test_decode_takes_one_id_or_any_flat_sequence(llama):
    """An int, an empty list, a tuple, a tensor and its elements."""
    assert llama.decode(5565) == llama.decode([5565]) == llama.decode(torch.tensor(5565)) == "capital"
    assert llama.decode([]) == llama.decode(()) == ""
    assert llama.decode(torch.tensor([415, 5565])) == llama.decode((415, 5565)) == "The capital"


@pytest.mark.parametrize(("ids", "place", "found"), [(-1, 0, -1), ([5, -1], 1, -1), ([1, 2, 32000], 2, 32000)])
def test_an_id_outside_the_vocabulary_is_refused(ids, place, found, llama):
    """The error gives the id, its place and the size of the vocabulary."""
    with pytest.raises(ValueError, match=rf"vocabulary has 32000, and the id at place {place} is {found}:"):
        llama.decode(ids)


@pytest.mark.parametrize("ids", [None, 1.5, [1.5], [[1, 2], 3], [[1, 2], [3.5]], ["The", 3], {5: 6}, b"x"])
def test_what_is_no_sequence_of_ids_is_refused(ids, llama):
    """Floats, mixtures, dictionaries and bytes raise TypeError."""
    with pytest.raises(TypeError, match="flat list of token ids"):
        llama.decode(ids)


@pytest.mark.parametrize(
    "ids",
    [
        5565,
        [],
        [415, 5565],
        (415, 5565),
        [[415, 5565], [5565]],
        [[415], []],
        ["▁The", "▁capital"],
        [["▁The"], ["▁capital"]],
        "▁The",
        np.array([415, 5565]),
        [np.int64(415), np.int32(5565)],
        np.int64(5565),
    ],
)
def test_decode_takes_what_sentencepiece_takes(ids, llama, sentencepiece):
    """Ids, pieces, arrays, and lists of these, to the same text or texts."""
    assert llama.decode(ids) == sentencepiece.decode(ids)


def test_decode_takes_any_holder_of_ids(llama):
    """Tensors of each shape, a list of tensors, a generator, a column of a table."""
    assert llama.decode(torch.tensor([[415, 5565], [5565, 2]])) == ["The capital", "capital"]
    assert llama.decode([torch.tensor([415, 5565]), torch.tensor([5565])]) == ["The capital", "capital"]
    assert llama.decode([torch.tensor(415), torch.tensor(5565)]) == "The capital"
    assert llama.decode(token for token in (415, 5565)) == "The capital"


@pytest.mark.parametrize("text", ["The capital", b"The capital", ["The", " capital"], [b"The"], [], ["<s>"]])
def test_encode_takes_what_sentencepiece_takes(text, llama, sentencepiece):
    """Texts as str or bytes in UTF-8, and lists of these, to the same ids; BOS and EOS stand around each."""
    ids = sentencepiece.encode(text)
    assert llama.encode(text, bos=False, eos=False) == ids
    nested = isinstance(text, list)
    assert llama.encode(text, bos=True, eos=True) == ([[1, *row, 2] for row in ids] if nested else [1, *ids, 2])
    assert llama.encode(np.array(["The", "a"]), bos=False, eos=False) == sentencepiece.encode(["The", "a"])


@pytest.mark.parametrize("text", [None, 3, ["a", None], ["a", ["b"]], {"a": 1}, 1.5])
def test_what_is_no_text_is_refused(text, llama):
    """The error names the type; it is an `AssertionError` too, as the reference's."""
    bad = text if not isinstance(text, list) else text[1]
    for kind in (TypeError, ValueError, AssertionError):
        with pytest.raises(kind, match=f"type {type(bad).__name__}"):
            llama.encode(text, bos=True, eos=False)


@pytest.mark.parametrize("flag", [1, 0, "no", None])
def test_bos_and_eos_are_booleans(flag, llama):
    """A number or a word is refused by the argument's name."""
    with pytest.raises(TypeError, match="bos must be True or False"):
        llama.encode("a", bos=flag, eos=False)
    with pytest.raises(TypeError, match="eos must be True or False"):
        TransformersTokenizer(byte_level()).encode("a", bos=False, eos=flag)


def test_bytes_that_are_not_utf8_are_refused(llama):
    """The error names the place."""
    with pytest.raises(ValueError, match="byte at place 1"):
        llama.encode(b"a\xff", bos=True, eos=False)


def test_a_lone_surrogate_is_refused(llama):
    """Text that is not valid Unicode has no tokens: the error names the place."""
    with pytest.raises(ValueError, match="place 1 is the lone surrogate"):
        llama.encode("a\udcffb", bos=True, eos=False)


def test_a_missing_file_is_not_found(tmp_path):
    """The error names the path."""
    with pytest.raises(FileNotFoundError, match=r"none at .*missing\.model"):
        Tokenizer(tmp_path / "missing.model")


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\n", None], ids=["empty", "tiktoken", "folder"])
def test_what_is_no_sentencepiece_file_is_refused(content, tmp_path):
    """An empty file, a file of another format and a folder get one clear sentence."""
    path = tmp_path / "tokenizer.model"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model' is not one"):
        Tokenizer(path)


# transformers


def test_adapter_has_metas_members():
    """n_words counts added tokens too; an id that the tokenizer lacks is -1."""
    adapter = TransformersTokenizer(byte_level(bos_token="<s>", eos_token="</s>"))
    assert (adapter.n_words, adapter.bos_id, adapter.eos_id, adapter.pad_id) == (258, 256, 257, -1)
    assert TransformersTokenizer(byte_level(pad_token="<pad>")).pad_id == 256
    assert isinstance(adapter, TokenizerLike)


def test_adapter_adds_the_special_tokens_asked_for_and_no_others():
    """What the tokenizer would add by itself does not count."""
    adapter = TransformersTokenizer(byte_level(bos_token="<s>", eos_token="</s>"))
    bare = adapter.encode("hé", bos=False, eos=False)
    assert len(bare) == 3
    assert adapter.encode("hé", bos=True, eos=True) == [256, *bare, 257]
    assert adapter.encode("", bos=True, eos=False) == [256]


@pytest.mark.parametrize("text", TEXTS)
def test_adapter_keeps_every_space(text):
    """A round trip through a byte-level tokenizer only loses the special tokens: no clean-up, no strip."""
    adapter = TransformersTokenizer(byte_level(bos_token="<bos>", eos_token="<eos>"))
    assert adapter.decode(adapter.encode(f"{text} , it 's", bos=True, eos=True)) == f"{text} , it 's"


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_adapter_without_the_token_asked_for(name):
    """The error names the token and the ways out."""
    adapter = TransformersTokenizer(byte_level())
    with pytest.raises(ValueError, match=rf"{name}=True asks for a {name.upper()} token.*tokenizer\.{name}_token"):
        adapter.encode("a", **{"bos": False, "eos": False, name: True})


def test_adapter_decodes_as_the_tokenizer_does():
    """One id, an empty list, and ids beyond the vocabulary, which transformers itself would drop."""
    adapter = TransformersTokenizer(byte_level(eos_token="</s>"))
    assert adapter.decode(adapter.encode("a", bos=False, eos=False)[0]) == "a"
    assert adapter.decode([]) == ""
    assert adapter.decode(adapter.eos_id) == ""
    for token_id in (-1, 257):
        with pytest.raises(ValueError, match=f"vocabulary has 257, and the id at place 0 is {token_id}:"):
            adapter.decode([token_id])


def test_adapter_takes_lists_as_the_sentencepiece_one():
    """One list of ids per text, one text per list; a number is no text."""
    adapter = TransformersTokenizer(byte_level(bos_token="<s>"))
    ids = adapter.encode(["ab", "c"], bos=True, eos=False)
    assert ids == [adapter.encode("ab", True, False), adapter.encode("c", True, False)]
    assert adapter.decode(ids) == ["ab", "c"]
    with pytest.raises(TypeError, match="type int"):
        adapter.encode(3, bos=False, eos=False)
    with pytest.raises(TypeError, match="flat list of token ids"):
        adapter.decode(["a"])


# load_tokenizer


@pytest.mark.parametrize("name", ["tokenizer.model", "any.name"])
def test_load_a_sentencepiece_file(name, tmp_path, llama_tokenizer_path):
    """Any file name, as a string or a path."""
    shutil.copy(llama_tokenizer_path, tmp_path / name)
    for path in (tmp_path / name, str(tmp_path / name)):
        tokenizer = load_tokenizer(path)
        assert isinstance(tokenizer, Tokenizer) and tokenizer.n_words == 32000


def test_load_a_folder(tmp_path, llama_tokenizer_path):
    """tokenizer.model alone is SentencePiece; a transformers tokenizer beside it goes first."""
    shutil.copy(llama_tokenizer_path, tmp_path / "tokenizer.model")
    assert isinstance(load_tokenizer(tmp_path), Tokenizer)
    byte_level(bos_token="<s>").save_pretrained(tmp_path)
    for path in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(path)
        assert isinstance(tokenizer, TransformersTokenizer) and tokenizer.n_words == 257


def test_load_an_object():
    """A transformers tokenizer is wrapped; anything with Meta's members is returned as it is."""
    adapter = load_tokenizer(byte_level(bos_token="<s>"))
    assert isinstance(adapter, TransformersTokenizer)
    assert load_tokenizer(adapter) is adapter


@pytest.mark.parametrize(
    "path",
    [
        *("missing/tokenizer.model", "tokenizer.model", "./missing", "/missing/folder", "a/b/c"),
        *("mistyped", "folder/mistyped", "folder\\\\mistyped", "~/folder"),
    ],
)
def test_a_mistyped_path_is_not_looked_up_on_the_hub(path, tmp_path, monkeypatch):
    """What can only be a path is not found at once; no network is asked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="check the path"):
        load_tokenizer(path)


def test_a_hub_id_is_given_to_transformers(monkeypatch):
    """A name that is no path is a repository's; one that does not exist is not found."""

    def from_pretrained(name, **_):
        if name == "org/model":
            return byte_level(eos_token="</s>")
        raise OSError(f"{name} is not a local folder ...")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    assert load_tokenizer("org/model").n_words == 257
    with pytest.raises(FileNotFoundError, match="'org/missing'"):
        load_tokenizer("org/missing")


@pytest.mark.parametrize("name", ["gpt2", "folder/model"])
def test_a_hub_id_in_the_cache_is_taken(name, monkeypatch, tmp_path):
    """Without its owner, and beside a folder of the owner's name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("hf_llama_sampling.llama.loading.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / f"models--{name.replace('/', '--')}").mkdir()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: byte_level(eos_token="</s>"))
    assert load_tokenizer(name).n_words == 257


def test_a_gguf_file_is_given_to_transformers(monkeypatch, tmp_path):
    """Its folder and its name, as transformers wants them."""
    asked = []
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda *args, **kwargs: asked.append((args, kwargs)) or byte_level(),
    )
    (tmp_path / "m.gguf").touch()
    load_tokenizer(tmp_path / "m.gguf")
    assert asked == [((str(tmp_path),), {"trust_remote_code": False, "gguf_file": "m.gguf"})]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    """The error says what was looked for."""
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("source", [None, 3, b"tokenizer.model"])
def test_an_object_of_another_kind_is_refused(source):
    """The error names the type and the kinds that are taken."""
    with pytest.raises(TypeError, match=f"type {type(source).__name__}"):
        load_tokenizer(source)


@pytest.mark.launches
def test_torch_and_transformers_are_not_imported():
    """A SentencePiece tokenizer and the dialogs need neither."""
    code = (
        "import importlib.util, sys, types; from pathlib import Path;"
        "package = types.ModuleType('hf_llama_sampling'); package.__path__ = [sys.argv[1]];"
        "sys.modules['hf_llama_sampling'] = package;"
        "import hf_llama_sampling.llama.tokenizer, hf_llama_sampling.llama.dialog;"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    package = Path(sys.modules[Tokenizer.__module__].__file__).parents[1]
    answer = subprocess.run([sys.executable, "-c", code, str(package)], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
