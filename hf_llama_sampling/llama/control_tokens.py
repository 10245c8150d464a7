"""Encode text as text: a control token that is spelled out in it is encoded as characters.

Control tokens are a tokenizer's special tokens, and the added tokens that its chat template writes. To tell those in a
message from the template's own, a mark is put inside the former before the template runs::

    message     Hi <|im_end|> there
    marked      Hi <#|im_end|> there            no longer a control token
    rendered    <|im_start|>user\\nHi <#|im_end|> there<|im_end|>
    encoded     with # as one more special token, whose id is dropped

What this module does not do: it renders no template.
"""

import copy
import re
import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\ue0f0\uf0b7\ue0f1"  # private-use characters, which no text should hold in this order


class ControlTokens:
    """Knows the control tokens of a transformers tokenizer, and encodes text that may spell them."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self._found: tuple[Any, dict[str, int], re.Pattern[str]] | None = None

    def _lookup(self) -> tuple[dict[str, int], re.Pattern[str]]:
        """Map control tokens to ids, with a pattern that finds their spellings; redo it if the tokenizer changes."""
        state = (len(self.tokenizer), str(self.tokenizer.chat_template))
        if self._found is None or self._found[0] != state:
            special = set(self.tokenizer.all_special_tokens)  # `added_tokens_decoder` does not mark all as special
            ids = {token: self.tokenizer.convert_tokens_to_ids(token) for token in special} | {
                token.content: token_id
                for token_id, token in self.tokenizer.added_tokens_decoder.items()
                if token.special or token.content in state[1]
            }
            # A token of one character, or of blanks, is the ordinary spelling of these characters.
            ids = {token: token_id for token, token_id in ids.items() if len(token.strip()) > 1}
            longest_first = sorted(ids, key=len, reverse=True)
            pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
            self._found = (state, ids, pattern)
        return self._found[1:]

    @cached_property
    def _marking(self) -> "tuple[PreTrainedTokenizerBase, int]":
        """Copy the tokenizer, add the mark as a token, and return both the copy and the mark's id."""
        from transformers import AddedToken

        twin: Any = copy.deepcopy(self.tokenizer)
        twin.add_tokens([AddedToken(_MARK, special=True, normalized=False)], special_tokens=True)
        return twin, twin.convert_tokens_to_ids(_MARK)

    def begins(self, text: str) -> str | None:
        """Return the control token that a text begins with, else None."""
        found = self._lookup()[1].match(text.lstrip())
        return found[0] if found else None

    def break_in(self, value: Any) -> Any:
        """Put the mark inside each control token that texts spell, also within lists and dictionaries."""
        if isinstance(value, str):
            return self._break(value)
        if isinstance(value, Mapping):
            return {key: self.break_in(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.break_in(item) for item in value]
        return value

    def _break(self, text: str) -> str:
        _, pattern = self._lookup()
        text, parts, at = text.replace(_MARK, ""), [], 0
        while found := pattern.search(text, at):
            cut = found.start() + 1
            parts += [text[at:cut], _MARK]
            at = cut  # continue inside: a control token may begin within another
        return "".join([*parts, text[at:]])

    def encode_text(self, text: str) -> list[int]:
        """Encode a text without control tokens, whatever it spells.

        Raises:
            ValueError: the tokenizer makes a control token of characters that do not spell it.
        """
        ids: list[int] = self.tokenizer.encode(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            verbose=False,  # the length is checked later, against the actual limit
        )
        if self._control_ids(ids):  # the tokenizer ignores the option, or its vocabulary spells control tokens
            ids = self._encode_marked(self._break(text))
        return self._checked(ids, expected=[])

    def encode_rendered(self, rendered: str) -> list[int]:
        """Encode a rendered template, in whose messages `break_in` has marked control tokens.

        Raises:
            ValueError: the tokenizer makes a control token of characters that do not spell it.
        """
        spelled, pattern = self._lookup()
        written = [spelled[token] for token in pattern.findall(rendered)]
        if _MARK in rendered:
            ids = self._encode_marked(rendered)
        else:
            ids = self.tokenizer.encode(rendered, add_special_tokens=False, split_special_tokens=False)
        return self._checked(ids, expected=self._control_ids(written))

    def _encode_marked(self, text: str) -> list[int]:
        twin, mark = self._marking
        ids: list[int] = twin.encode(text, add_special_tokens=False, split_special_tokens=False)
        return [token for token in ids if token != mark]

    def _control_ids(self, ids: list[int]) -> list[int]:
        """Select the control tokens among ids, except the unknown token, which unknown characters become too."""
        control = set(self._lookup()[0].values()) - {self.tokenizer.unk_token_id}
        return [token for token in ids if token in control]

    def _checked(self, ids: list[int], *, expected: list[int]) -> list[int]:
        found = self._control_ids(ids)
        if found != expected:
            extra = next((token for token in found if token not in expected), found[0] if found else expected[0])
            raise ValueError(
                f"text must not become control tokens, but this tokenizer makes {self.tokenizer.decode([extra])!r} of "
                "characters in it: remove them, or give token ids"
            )
        return ids


def warn_of_template_text(text: str, control: ControlTokens) -> None:
    """Warn of a text that begins with a control token, like the output of a chat template."""
    token = control.begins(text)
    if token is not None:
        warnings.warn(
            f"the text begins with the control token {token!r}, which is encoded as characters, as in the reference: "
            "for a chat template give the messages to chat_completion(..., chat_format='template'), or give generate "
            "the ids of tokenizer(text, add_special_tokens=False)",
            stacklevel=3,
        )
