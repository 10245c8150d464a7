"""A text as the pieces that its tokens spell."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from hf_llama_sampling import Tokenizer
from hf_llama_sampling.evaluation.pieces import pieces_of, text_after
from tests.conftest import TINY, examples

SENTENCE = Tokenizer(TINY / "tokenizer.model")


def byte_level():
    """A tokenizer of bytes, with two merges: GPT-2's kind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: place for place, piece in enumerate([*alphabet, "th", "the"])}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return fast


BYTES = byte_level()


def encoders():
    """(encode, decode) of each kind of tokenizer."""
    yield lambda text: SENTENCE.encode(text, bos=False, eos=False), SENTENCE.decode
    yield lambda text: BYTES.encode(text).ids, lambda ids: BYTES.decode(list(ids))


@settings(**examples(40))
@given(st.text(alphabet="the king\n\t \u00e9\u4f60\U0001f642\u0301\u202e\ufffd<>&", max_size=24))
def test_pieces_add_up(text):
    """Texts joined are the decoded text, tokens joined are the tokens, and each piece stands where it says."""
    for encode, decode in encoders():
        ids = encode(text)
        whole, pieces = decode(ids), pieces_of(ids, decode)
        assert "".join(piece.text for piece in pieces) == whole
        assert [place for piece in pieces for place in range(piece.first, piece.last)] == list(range(len(ids)))
        assert all(whole.startswith(piece.text, piece.start) for piece in pieces)


def test_a_character_of_several_tokens_is_one_piece():
    """No piece holds half a character; tokens that are whole characters stand alone."""
    for encode, decode in encoders():
        pieces = pieces_of(encode("a\u4f60 the"), decode)
        (chinese,) = [piece for piece in pieces if "\u4f60" in piece.text]
        assert chinese.text == "\u4f60" and chinese.last - chinese.first == 3
        assert all(piece.last - piece.first == 1 for piece in pieces if piece.text == "the")


def test_bytes_that_never_make_a_character_end_a_piece():
    """Neither endless pieces nor lost tokens, whatever the ids are."""
    ids = BYTES.encode("\u4f60").ids[:1] * 100
    pieces = pieces_of(ids, lambda part: BYTES.decode(list(part)))
    assert sum(piece.last - piece.first for piece in pieces) == 100 and len(pieces) > 1


def test_a_decoder_that_rewrites_its_past_gives_one_piece():
    """Where texts of parts do not add up to the text, nothing is made up."""
    ids = [1, 2, 3]
    assert pieces_of(ids, lambda part: "".join(map(str, sorted(part, reverse=True)))) == [("321", 0, 0, 3)]


def test_half_characters_go_by_their_bytes():
    """Of either kind of vocabulary, spelled alike."""
    for ids, decode, name in [
        (BYTES.encode("\u4f60").ids, lambda ids: BYTES.decode(list(ids)), BYTES.id_to_token),
        (SENTENCE.encode("\u4f60", False, False)[-3:], SENTENCE.decode, SENTENCE.sp_model.id_to_piece),
    ]:
        assert [text_after([], token, decode, name(token)) for token in ids] == ["<0xE4>", "<0xBD>", "<0xA0>"]


@pytest.mark.parametrize(("token", "text"), [(SENTENCE.encode("king", False, False)[0], " king"), (2, "</s>")])
def test_a_token_after_another(token, text):
    """Its blank is there, and a token without characters goes by its name."""
    before = SENTENCE.encode("The", bos=False, eos=False)
    assert text_after(before, token, SENTENCE.decode, "</s>") == text
