"""Choosing how a batch is laid out in columns.

*reference* is the reference's schedule: all rows start at column 0, the loop starts at the shortest prompt's end, and
longer prompts are forced token by token. *padded* puts all prompts' ends into one column by left padding::

    reference  p p P P g g    padded    . . p p g g        p: prefilled   P: forced   g: generated
               p p p g g g              . p p p g g g      .: pad, masked

What this module does not do: it lays out no tensor.
"""

from collections.abc import Callable, Sequence
from typing import Literal

Schedule = Literal["auto", "reference", "padded"]
Layout = Literal["reference", "padded"]


def choose_schedule(
    asked: Schedule,
    lengths: Sequence[int],
    limits: Sequence[int],
    context: int | None,
    *,
    takes_padding: Callable[[], bool],
    timed: bool,
) -> Layout:
    """Choose padded for a ragged batch that fits the model's context that way, reference otherwise.

    Beyond the context, a padded batch would put rows that wait for others at positions that the model does not have.

    Args:
        asked: the schedule that the call asks for.
        lengths: of the prompts, in tokens.
        limits: most new tokens of each row.
        context: the longest text the model was made for, or None if unknown.
        takes_padding: answers whether a row stays what it is alone when masked padding stands before it.
        timed: whether the run ends after a time, which might be before all prompts are read.

    Raises:
        ValueError: the schedule asked for cannot be had with these prompts.
    """
    width = max(lengths) + max(limits)
    fits = context is None or width <= context
    ragged = min(lengths) < max(lengths)
    if asked == "padded" and not fits:
        raise ValueError(
            f'schedule="padded" needs the longest prompt and the most new tokens of any row to fit together in the '
            f'model\'s context of {context} tokens, got {width}: take schedule="reference", or fewer new tokens'
        )
    takes = not ragged or asked == "reference" or not fits or takes_padding()
    if asked == "padded" and not takes:
        raise ValueError(
            'schedule="padded" needs a model that leaves masked padding out of its answers, and this one reads it: '
            'take schedule="reference", or prompts of one length'
        )
    padded = asked == "padded" or (asked == "auto" and ragged and fits and takes)
    if timed and ragged and not padded:
        raise ValueError(
            "max_time may end a run before the longer prompts of a ragged batch are read in the reference schedule: "
            'take schedule="padded", or prompts of one length'
        )
    return "padded" if padded else "reference"
