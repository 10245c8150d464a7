"""LLAMA2's chat format: encode a dialog of messages as the token ids of one prompt.

The rules are those of the reference: facebookresearch/llama, llama/generation.py, ``chat_completion``. What this module
does not do: it generates nothing, decodes nothing, and never changes the dialog.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypedDict

from ..checks import ReferenceAssertion

if TYPE_CHECKING:
    from .tokenizer import TokenizerLike

Role = Literal["user", "system", "assistant"]


class Message(TypedDict):
    """One message: its role, and its text."""

    role: Role
    content: str


Dialog = list[Message]

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>", "<</SYS>>"
SPECIAL_TAGS = (B_INST, E_INST, B_SYS, E_SYS)
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."

_ROLES = ("user", "system", "assistant")


class Turn(NamedTuple):
    """The text of a user message, with its answer if it has one, to encode after a BOS."""

    text: str
    finished: bool  # ends with EOS


def is_unsafe(dialog: Sequence[Message], *, row: int | None = None) -> bool:
    """Whether any message, of whatever role, contains one of the four ``SPECIAL_TAGS``.

    Raises:
        ValueError: the dialog breaks a rule of the format, as in `dialog_tokens`.
    """
    check_dialog(dialog, row=row)
    return any(tag in message["content"] for message in dialog for tag in SPECIAL_TAGS)


def dialog_tokens(dialog: Sequence[Message], tokenizer: "TokenizerLike", *, row: int | None = None) -> list[int]:
    """The prompt of a dialog: an optional system message, then user and assistant in turn, the last from the user.

    Every finished pair of turns stands between BOS and EOS; the last user message follows a BOS and is left open for
    the model's answer. A tokenizer without a BOS leaves it out. Tags in a message are encoded like other text:
    `is_unsafe` tells whether there are any.

    Args:
        dialog: messages, each with a ``"role"`` and a ``"content"``, a text.
        tokenizer: anything with Meta's five members.
        row: which dialog of a batch this is; error messages then name it.

    Returns:
        Token ids, a flat list.

    Raises:
        ValueError: the dialog is empty, a message is malformed, or the roles are out of turn.
    """
    check_dialog(dialog, row=row)
    ids = []
    for turn in dialog_turns(dialog):
        ids += tokenizer.encode(turn.text, bos=tokenizer.bos_id >= 0, eos=turn.finished)
    return ids


def dialog_turns(dialog: Sequence[Message]) -> list[Turn]:
    """Split a dialog, which `check_dialog` has passed, into turns.

    >>> dialog_turns([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi "}])
    [Turn(text='[INST] <<SYS>>\\nBe brief.\\n<</SYS>>\\n\\nhi [/INST]', finished=False)]
    """
    texts = [text.strip() for text in _fold_system(dialog)]
    turns = []
    for user, assistant in zip(texts[:-1:2], texts[1::2], strict=True):
        turns.append(Turn(f"{B_INST} {user} {E_INST} {assistant} ", finished=True))
    return [*turns, Turn(f"{B_INST} {texts[-1]} {E_INST}", finished=False)]


def _fold_system(dialog: Sequence[Message]) -> list[str]:
    """Return the messages' contents; prepend a leading system message to the first user message."""
    texts = [message["content"] for message in dialog]
    if dialog[0]["role"] != "system":
        return texts
    system, user, *rest = texts
    return [f"{B_SYS}\n{system}\n{E_SYS}\n\n{user}", *rest]


def check_dialog(dialog: Sequence[Message], *, row: int | None = None) -> None:
    """Refuse a dialog that breaks a rule of the format; the error is also an `AssertionError`, as in the reference."""
    name = "the dialog" if row is None else f"dialog {row}"
    check_messages(dialog, name)
    for i, message in enumerate(dialog):
        _check_message(message, f"message {i} of {name}")
    _check_turns([message["role"] for message in dialog], name)


def check_messages(dialog: Sequence[Message], name: str = "the dialog") -> None:
    """Refuse a dialog that is not a list of messages, or is empty."""
    if not isinstance(dialog, Sequence) or isinstance(dialog, str):
        _refuse(
            f"a dialog is a list of messages, and {name} is of type {type(dialog).__name__}: "
            'give [{"role": "user", "content": "..."}]'
        )
    if not dialog:
        _refuse(f"a dialog ends with a user message, and {name} is empty: add one")
    for i, message in enumerate(dialog):
        if not isinstance(message, Mapping):
            _refuse(
                f"a message is a dictionary with a role and a content, and message {i} of {name} is of type "
                f'{type(message).__name__}: give {{"role": "user", "content": "..."}}'
            )


def check_template_messages(dialog: Sequence[Message], name: str = "the dialog") -> None:
    """Refuse messages that a chat template would print as Python prints them: it checks neither roles nor contents.

    Roles are the template's own. A content is a text or a list of text parts; beside `tool_calls` there may be none.
    """
    check_messages(dialog, name)
    for i, message in enumerate(dialog):
        if not isinstance(message.get("role"), str):
            _refuse(f"a role is a string, and that of message {i} of {name} is {message.get('role')!r}: give one")
        content: Any = message.get("content", "")  # a template says itself what it lacks
        if content is None and message.get("tool_calls"):
            continue
        _check_text(joined_parts(content, i), f"message {i} of {name}")


def with_plain_contents(dialog: Any) -> Any:
    """Replace contents that are lists of text parts, as OpenAI's API takes them, by one text, with a line per part."""
    if not isinstance(dialog, Sequence) or not all(isinstance(message, Mapping) for message in dialog):
        return dialog  # refused later
    return [
        {**message, "content": joined_parts(message["content"], i)}
        if isinstance(message.get("content"), list)
        else message
        for i, message in enumerate(dialog)
    ]


def joined_parts(content: Any, message: int) -> Any:
    """Join a list of text parts to one text; return any other content as it is.

    Raises:
        ValueError: a part is no text.
    """
    return "\n".join(_part_text(part, message) for part in content) if isinstance(content, list) else content


def _part_text(part: Any, message: int) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") in ("text", "input_text"):
        part = part.get("text")
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(f"a content's parts must be texts, and one of message {message} is {kind!r}: this reads text only")


def _check_message(message: Message, name: str) -> None:
    for key in ("role", "content"):
        if key not in message:
            _refuse(f"a message has a role and a content, and {name} has no {key!r}: add it")
    if message["role"] not in _ROLES:
        _refuse(
            f"a role is 'user', 'system' or 'assistant', and that of {name} is {message['role']!r}: use one of the "
            "three"
        )
    _check_text(message["content"], name)


def _check_text(content: object, name: str) -> None:
    if not isinstance(content, str):
        _refuse(f"a content is a string, and that of {name} is of type {type(content).__name__}: give its text")


def _check_turns(roles: list[Role], name: str) -> None:
    first = int(roles[0] == "system")
    for i, role in enumerate(roles[first:], start=first):
        if role == "system":
            _refuse(
                f"a system message comes first and only once, and message {i} of {name} is one: "
                "move its text into message 0"
            )
        expected = "user" if (i - first) % 2 == 0 else "assistant"
        if role != expected:
            _refuse(
                "after an optional system message, user and assistant take turns, starting with the user, and "
                f"message {i} of {name} is from {role!r}: put a message from {expected!r} there"
            )
    if roles[-1] != "user":
        _refuse(
            f"the last message of a dialog is from the user, and message {len(roles) - 1} of {name}, the last, is from "
            f"{roles[-1]!r}: append a user message"
        )


def _refuse(sentence: str) -> NoReturn:
    raise ReferenceAssertion(sentence)
