"""Choose how a batch is laid out in columns.

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
    """Choose the layout. "auto" takes padded for a ragged batch if it fits the context and the model ignores padding.

    A padded batch is as wide as the longest prompt plus the largest limit, since rows that are done are fed pads until
    the last row ends; beyond its context the model may have no such positions.

    Args:
        asked: the schedule that the call asks for.
        lengths: tokens of each prompt.
        limits: most new tokens of each row.
        context: the longest text the model was made for, or None if unknown.
        takes_padding: tells whether masked padding before a row leaves its logits unchanged.
        timed: whether `max_time` may end the run before all prompts are forwarded.

    Raises:
        ValueError: the schedule does not suit these prompts, the model or `max_time`.
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
