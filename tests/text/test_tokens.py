"""What tokens spell: bytes and offsets add up to the text, with byte-fallback and byte-level vocabularies."""

import hypothesis
import hypothesis.strategies as st
import pytest
import transformers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from hf_llama_sampling import Tokenizer
from hf_llama_sampling.llama.tokenizer import TransformersTokenizer
from hf_llama_sampling.text.tokens import TokenSpeller
from tests.conftest import TINY, examples

TEXT = "The king of 你好 😀👨‍👩‍👧 é e\u0301\n\n  and  \tGaunt. 你你"
KINDS = ("sentencepiece", "fallback", "byte level")
SPELLERS = {}


def byte_level():
    """A byte-level BPE tokenizer in the manner of GPT-2, with some merges, also across bytes of characters."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    fast.train_from_iterator([TEXT, "the king and the queen " * 4], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")


def speller(kind):
    """One speller of each kind of vocabulary."""
    if kind not in SPELLERS:
        tokenizer = {
            "sentencepiece": lambda: Tokenizer(TINY / "tokenizer.model"),
            "fallback": lambda: transformers.AutoTokenizer.from_pretrained(TINY),
            "byte level": byte_level,
        }[kind]()
        SPELLERS[kind] = TokenSpeller(tokenizer)
    return SPELLERS[kind]


def encode(kind, text):
    """Ids of a text, without control tokens."""
    tokenizer = speller(kind).tokenizer
    if kind == "sentencepiece":
        return tokenizer.encode(text, False, False)
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(**examples(25))
@hypothesis.given(text=st.text(alphabet="ab é你😀\n.", max_size=12))
@hypothesis.example(text=TEXT)
def test_tokens_add_up_to_the_text(kind, text):
    """Bytes are the text's own in UTF-8; an offset counts the characters that end within the bytes before it."""
    ids = encode(kind, text)
    found = speller(kind).texts(ids)
    joined = b"".join(found.bytes)
    dropped = len(joined) - len(text.encode())  # the space that SentencePiece puts before a text
    assert found.text == "".join(found.pieces) == text
    assert joined[dropped:] == text.encode() and joined[:dropped] in (b"", b" ")
    ends = [len(text[: count + 1].encode()) for count in range(len(text))]
    for place, offset in enumerate(found.offsets):
        before = max(0, len(b"".join(found.bytes[:place])) - dropped)
        assert offset == sum(end <= before for end in ends)


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_add_up_to_what_the_tokenizer_decodes(kind):
    """Also where bytes make no characters, and where control tokens stand in between."""
    whole = encode(kind, TEXT)
    for step in (2, 3, 5):
        for ids in (whole[::step], [1, *whole[step::step], 2, *whole[:3]], whole[::-1], [], [10**6, *whole[:4]]):
            found = speller(kind).texts(ids)
            assert found.text == speller(kind).text_of(ids) == "".join(found.pieces)
            assert len(found.offsets) == len(found.bytes) == len(ids)
            assert found.offsets == sorted(found.offsets)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_add_up_wherever_a_text_is_cut(kind):
    """Also within a character, which then belongs to the completion; and after a BOS alone."""
    ids = [1, *encode(kind, TEXT)] if kind != "byte level" else encode(kind, TEXT)
    whole = speller(kind).texts(ids)
    assert whole.text == TEXT
    for cut in range(1, len(ids)):
        text = speller(kind).text_after(ids[:cut])(ids[cut:])
        assert text == TEXT[whole.offsets[cut] :]
        assert speller(kind).texts(ids, given=cut).text == text
    assert speller(kind).text_after(ids)([]) == ""


def test_names_are_texts_or_bytes():
    """A token alone: its text, its bytes where they make no character, and its piece where it spells nothing."""
    fallback = speller("fallback")
    assert [fallback.name_of(token) for token in (1, 0xE4 + 3, 0x0A + 3, 542)] == [
        "<s>",
        "bytes:\\xe4",
        "\n",
        " king",
    ]
    for kind in (fallback, TokenSpeller(Tokenizer(f"{TINY}/tokenizer.model"))):  # a model may have more ids
        assert (kind.name_of(1030), kind.bytes_of(1030), kind.text_of([542, 1030])) == ("<1030>", b"", "king")
    wrapped = TokenSpeller(TransformersTokenizer(fallback.tokenizer))
    assert wrapped.texts([1, 367, 542]) == fallback.texts([1, 367, 542])
    assert fallback.texts([1, 367, 542]).bytes == [b"", b" The", b" king"]


def test_a_tokenizer_that_does_more_than_join(golden_model):
    """Offsets then come from decoding what stands before; anything with Meta's five members will do."""

    class Shouting:
        n_words, bos_id, eos_id, pad_id = 26, -1, -1, -1

        def encode(self, s, bos, eos):
            return [ord(letter) - 97 for letter in s if "a" <= letter <= "z"]

        def decode(self, ids):
            text = "".join(chr(97 + token) for token in ids)
            return text.capitalize()

    found = TokenSpeller(Shouting()).texts([0, 1, 2])
    assert (found.text, found.offsets, found.pieces) == ("Abc", [0, 1, 2], ["A", "b", "c"])


def test_which_bytes_may_change_those_before_them():
    """The `tokenizers` library decodes a run of bytes as a whole, SentencePiece and byte-level decoders do not."""
    assert speller("sentencepiece").is_byte is None and speller("byte level").is_byte is None
    is_byte = speller("fallback").is_byte
    assert [is_byte(token) for token in (0xE4 + 3, 542, 10**6)] == [True, False, False]
