"""Chat templates: Jinja programs that come with a tokenizer, run in transformers' sandbox within a budget of steps.

The sandbox keeps a template from files, attributes and large ranges; the budget stops nested loops. What this module
does not do: it encodes nothing.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from .dialog import with_plain_contents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STEPS = 20_000_000  # lines of Python: a template of 300 lines compiles and runs in less than a million


class _TooManySteps(Exception):
    """A template used up its budget."""


def render_chat(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, Any]]) -> str:
    """Render a conversation in the tokenizer's own chat format, open for the assistant's answer.

    A content that is a list of text parts becomes one text, with a line per part, if the template takes no lists: if it
    fails, or prints them as Python does.

    Raises:
        ValueError: the template refuses the messages, fails, or does not end.
        ImportError: jinja2 is missing.
    """
    parts = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    if parts:
        try:
            rendered = _rendered(tokenizer, messages)
        except ValueError:
            rendered = ""
        if rendered and not any(str(content) in rendered for content in parts):
            return rendered
    return _rendered(tokenizer, with_plain_contents(messages))


def _rendered(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, Any]]) -> str:
    try:
        with _step_budget(_STEPS):
            rendered = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except ImportError:
        raise
    except _TooManySteps:
        raise ValueError(
            f"a chat template must end within {_STEPS:,} steps, and this tokenizer's does not: correct it, or take "
            'chat_format="llama2"'
        ) from None
    except Exception as error:  # a template is a program: it may raise anything
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f'the tokenizer\'s chat template refuses these messages ({said}): change them, or take chat_format="llama2"'
        ) from error
    return str(rendered)


@contextlib.contextmanager
def _step_budget(steps: int) -> Iterator[None]:
    """Stop the code inside after `steps` lines of Python: unlike a clock, a count is the same on every machine."""
    left = steps

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooManySteps
        return count

    earlier = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(earlier)
