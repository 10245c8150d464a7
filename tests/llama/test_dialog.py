import copy
import json
from pathlib import Path

import pytest

from hf_llama_sampling.llama.dialog import SPECIAL_TAGS, UNSAFE_ERROR, dialog_tokens, is_unsafe
from hf_llama_sampling.llama.tokenizer import Tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "completion.json").read_text(encoding="utf-8"))["chat"]

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}


class Spelling:
    """A tokenizer whose ids are code points, with BOS "^" and EOS "$": what was encoded can be read."""

    n_words, bos_id, eos_id, pad_id = 0x110000, ord("^"), ord("$"), -1

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        return [ord(c) for c in "^" * bos + s + "$" * eos]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def spelled(*messages):
    return Spelling().decode(dialog_tokens(list(messages), Spelling()))


@pytest.mark.parametrize("row", range(len(GOLDEN["dialogs"])))
def test_prompt_is_the_references(row, llama_tokenizer_path):
    """Every recorded dialog becomes the ids that reached the reference's generate."""
    assert dialog_tokens(GOLDEN["dialogs"][row], Tokenizer(llama_tokenizer_path)) == GOLDEN["prompt_tokens"][row]


@pytest.mark.parametrize("row", range(len(GOLDEN["dialogs"])))
def test_unsafe_dialogs_are_those_that_the_reference_refused(row):
    """A dialog is unsafe exactly where the reference answered with the error text."""
    refused = GOLDEN["predictions"][row]["generation"]["content"] == UNSAFE_ERROR
    assert is_unsafe(GOLDEN["dialogs"][row]) is refused


def test_turns_are_framed_and_the_last_is_left_open():
    """Each finished pair stands between BOS and EOS; the last user message has a BOS only."""
    assert (
        spelled(USER, ASSISTANT, {"role": "user", "content": "bye"}) == "^[INST] hi [/INST] hello $^[INST] bye [/INST]"
    )


def test_system_message_is_folded_into_the_first_user_message():
    """The system message stands between its tags, in front of the first user message and inside [INST]."""
    assert spelled(SYSTEM, USER) == "^[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhi [/INST]"


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([("user", "\u3000 hi\u00a0\n")], "^[INST] hi [/INST]"),
        ([("system", "  S  "), ("user", "  a  ")], "^[INST] <<SYS>>\n  S  \n<</SYS>>\n\n  a [/INST]"),
        ([("user", "a"), ("assistant", "\t b \n"), ("user", "c")], "^[INST] a [/INST] b $^[INST] c [/INST]"),
    ],
    ids=["unicode white space", "folded content", "assistant"],
)
def test_white_space_is_stripped_from_the_folded_content(messages, text):
    """White space is stripped at the ends of a turn; between system and user text it is the user's own."""
    assert spelled(*({"role": role, "content": content} for role, content in messages)) == text


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([("user", "")], "^[INST]  [/INST]"),
        ([("system", ""), ("user", "a")], "^[INST] <<SYS>>\n\n<</SYS>>\n\na [/INST]"),
        ([("system", "S"), ("user", "")], "^[INST] <<SYS>>\nS\n<</SYS>> [/INST]"),
        ([("user", "a"), ("assistant", ""), ("user", "b")], "^[INST] a [/INST]  $^[INST] b [/INST]"),
    ],
    ids=["user", "system", "user after system", "assistant"],
)
def test_empty_contents_keep_the_format(messages, text):
    """An empty content is a content: the tags around it stay."""
    assert spelled(*({"role": role, "content": content} for role, content in messages)) == text


@pytest.mark.parametrize("tag", SPECIAL_TAGS)
@pytest.mark.parametrize("position", range(4))
def test_a_tag_in_any_message_makes_a_dialog_unsafe(tag, position):
    """All four tags count, in system, user and assistant messages alike."""
    dialog = copy.deepcopy([SYSTEM, USER, ASSISTANT, USER])
    assert not is_unsafe(dialog)
    dialog[position]["content"] = f"x{tag}y"
    assert is_unsafe(dialog)


@pytest.mark.parametrize("text", ["[inst]", "[ INST]", "<<SYS>", "<SYS>>", "INST", "</SYS>"])
def test_what_only_resembles_a_tag_is_safe(text):
    """Tags are compared as they are, letter by letter."""
    assert not is_unsafe([{"role": "user", "content": text}])


def test_the_callers_dialog_is_left_alone():
    """Neither function changes a message or the list, although the system message is folded."""
    dialog = copy.deepcopy([SYSTEM, USER, ASSISTANT, USER])
    before = copy.deepcopy(dialog)
    dialog_tokens(dialog, Spelling())
    is_unsafe(dialog)
    assert dialog == before


def test_further_keys_are_allowed():
    """Messages from a data set may carry more than a role and a content."""
    assert spelled({"role": "user", "content": "hi", "id": 7}) == "^[INST] hi [/INST]"


@pytest.mark.parametrize(
    ("dialog", "words"),
    [
        ([], ["dialog 3", "empty"]),
        ([SYSTEM], ["message 0 of dialog 3", "'system'", "from the user"]),
        ([ASSISTANT, USER], ["message 0 of dialog 3", "'assistant'", "'user'"]),
        ([USER, USER], ["message 1 of dialog 3", "'user'", "'assistant'"]),
        ([SYSTEM, ASSISTANT], ["message 1 of dialog 3", "'assistant'"]),
        ([USER, ASSISTANT], ["message 1 of dialog 3", "'assistant'", "from the user"]),
        ([USER, SYSTEM, USER], ["message 1 of dialog 3", "system message"]),
        ([SYSTEM, SYSTEM, USER], ["message 1 of dialog 3", "system message"]),
        ([{"content": "hi"}], ["message 0 of dialog 3", "'role'"]),
        ([USER, {"role": "assistant"}, USER], ["message 1 of dialog 3", "'content'"]),
        ([{"role": "human", "content": "hi"}], ["message 0 of dialog 3", "'human'"]),
        ([{"role": ["user"], "content": "hi"}], ["message 0 of dialog 3", "['user']"]),
        ([{"role": "user", "content": None}], ["message 0 of dialog 3", "NoneType"]),
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], ["message 0 of dialog 3", "list"]),
        (["hi"], ["message 0 of dialog 3", "str"]),
        (USER, ["dialog 3", "dict"]),
        ("hi", ["dialog 3", "str"]),
        (None, ["dialog 3", "NoneType"]),
    ],
)
def test_a_broken_dialog_is_refused_in_one_sentence(dialog, words):
    """The error names the dialog, the message, the value and the rule, in dialog_tokens and is_unsafe alike."""
    for refuse in (lambda: dialog_tokens(dialog, Spelling(), row=3), lambda: is_unsafe(dialog, row=3)):
        with pytest.raises(ValueError) as caught:
            refuse()
        message = str(caught.value)
        assert all(word in message for word in words), message
        assert "\n" not in message and ". " not in message


def test_a_lone_dialog_has_no_number():
    """Without a row the error says "the dialog"."""
    with pytest.raises(ValueError, match="message 0 of the dialog"):
        dialog_tokens([SYSTEM], Spelling())
