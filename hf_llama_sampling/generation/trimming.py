"""Cut the answer out of a finished row, and tell why the row ended. Pure Python.

The rule is facebookresearch/llama, ``llama/generation.py``, the end of ``Llama.generate``: prompt + at most
``max_gen_len`` tokens, without the prompt unless ``echo``, cut before the first EOS. What this module does not do: it
never looks at text, and never guesses padding from token ids.
"""

from collections.abc import Collection, Sequence
from typing import Literal

Compat = Literal["meta", "fixed"]
FinishReason = Literal["stop", "length"]


def answer_span(
    tokens: Sequence[int], prompt_len: int, *, echo: bool, eos_ids: Collection[int], compat: Compat
) -> slice:
    """Find the slice of a row that is its answer; it applies to logprobs too.

    With prompt ``P`` (EOS inside), completion ``g`` and EOS ``.`` the row ``P P . P g g .`` gives::

        echo=False                  ->          g g
        echo=True, compat="fixed"   ->  P P . P g g
        echo=True, compat="meta"    ->  P P             the reference cuts at the prompt's own EOS

    Args:
        tokens: the row: its prompt and at most `max_gen_len` tokens.
        prompt_len: number of prompt tokens.
        echo: whether the answer starts with the prompt.
        eos_ids: the ids that end a text.
        compat: `"meta"` keeps the reference's cut at an EOS inside an echoed prompt, `"fixed"` does not.
    """
    start = 0 if echo else prompt_len
    search_from = start if compat == "meta" else prompt_len
    end = next((i for i in range(search_from, len(tokens)) if tokens[i] in eos_ids), len(tokens))
    return slice(start, end)


def finish_reason(completion: Sequence[int], eos_ids: Collection[int], *, stopped: bool) -> FinishReason:
    """`"stop"` if the completion holds an EOS or a stopping criterion ended it, `"length"` if it ran to its limit."""
    return "stop" if stopped or any(token in eos_ids for token in completion) else "length"
