"""A text that grows: at every moment what was given out is a beginning of the final text, and of the final tokens."""

import hypothesis
import hypothesis.strategies as st
import pytest

from hf_llama_sampling.text.growing import GrowingText
from hf_llama_sampling.text.stopping import StopStrings
from tests.conftest import examples
from tests.text.test_tokens import KINDS, encode, speller


def cut(text, strings):
    """The text before the first of some strings, and the string; the longest of several that begin there."""
    found = [(text.index(string), -len(string), string) for string in strings if string in text]
    return (text[: min(found)[0]], min(found)[2]) if found else (text, None)


def grown(kind, ids, strings, *, stop_early):
    """All items with their texts, the end, and how many tokens were taken."""
    stops = StopStrings(strings, 1)
    text = GrowingText(speller(kind).text_of, stops, is_byte=speller(kind).is_byte)
    out, taken = [], 0
    for place, token in enumerate(ids):
        out += text.add(token, place)
        taken += 1
        if stop_early and strings and stops.settled(0, text.text):
            break
    rest, end = text.end()
    return out + rest, end, taken


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(**examples(40))
@hypothesis.given(
    text=st.text(alphabet="abé你😀 ", max_size=14),
    strings=st.lists(st.text(alphabet="abé你😀 ", min_size=1, max_size=4), max_size=3),
)
@hypothesis.example(text="a you 你好", strings=["o", "you", "好"])
def test_pieces_add_up_and_hold_nothing_of_a_stop_string(kind, text, strings):
    """With and without ending at once: the text cut in plain Python, and the tokens that lie wholly before the cut."""
    ids = encode(kind, text)
    expected, string = cut(text, strings)
    for stop_early in (False, True):
        items, end, _ = grown(kind, ids, strings, stop_early=stop_early)
        assert "".join(piece for _, piece in items) + end.text == expected and end.stop == string
        assert "\ufffd" not in "".join(piece for _, piece in items)
        tokens = StopStrings(strings, 1).cut(0, ids, speller(kind).text_of).tokens
        assert [place for place, _ in items] == list(range(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_make_no_character_add_up_too(kind):
    """Whatever the decoder makes of them, nothing that was given out is taken back."""
    whole = encode(kind, "你好 é😀 x")
    for ids in (whole[::-1], whole[::2], whole[1:], whole[:-1] + whole[:2]):
        items, end, _ = grown(kind, ids, [], stop_early=False)
        assert "".join(piece for _, piece in items) + end.text == speller(kind).text_of(ids)
        assert [place for place, _ in items] == list(range(len(ids)))


def test_a_text_ends_once_no_later_text_can_change_where():
    """A string inside a longer one that is on its way waits for it; the answer is the same for all tokenizations."""
    for strings in (["b", "abc"], ["a", "abc"], ["abc", "bc", "c"]):
        for text in ("xabcy", "xaby", "xabxabc", "xab"):
            stops = StopStrings(strings, 1)
            for first in range(len(text) + 1):
                if stops.settled(0, text[:first]):
                    assert cut(text[:first], strings) == cut(text, strings)
                    break
            assert stops.find(0, text) == (
                None if cut(text, strings)[1] is None else (len(cut(text, strings)[0]), cut(text, strings)[1])
            )
