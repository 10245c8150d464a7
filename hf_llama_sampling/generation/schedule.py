"""Choosing how a batch is laid out in columns.

*reference* is the reference's schedule: all rows start at column 0, the loop starts at the shortest prompt's end, and
longer prompts are forced token by token. *padded* puts all prompts' ends into one column by left padding::

    reference  p p P P g g    padded    . . p p g g        p: prefilled   P: forced   g: generated
               p p p g g g              . p p p g g g      .: pad, masked

What this module does not do: it lays out no tensor.
"""

from collections.abc import Collection, Sequence
from typing import Literal

Schedule = Literal["auto", "reference", "padded"]
Layout = Literal["reference", "padded"]

# Options that count tokens from the prompts' end, which all rows must then reach at once.
COUNTING = {
    "min_length",
    "min_new_tokens",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "begin_suppress_tokens",
}
# Options that read whole prompts when the loop begins; in the reference schedule they would see prompts cut to the
# shortest one's length.
ON_WHOLE_PROMPTS = {"encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "guidance_scale"}
# Options that count n-grams; left padding would be counted as text.
ON_NGRAMS = {"no_repeat_ngram_size", "encoder_no_repeat_ngram_size"}


def choose_schedule(
    asked: Schedule, lengths: Sequence[int], limits: Sequence[int], context: int | None, options: Collection[str]
) -> Layout:
    """Choose padded for a ragged batch that fits the model's context that way, reference otherwise.

    Beyond the context, a padded batch would put rows that wait for others at positions that the model does not have.

    Args:
        asked: what the call says.
        lengths: of the prompts, in tokens.
        limits: most new tokens of each row.
        context: the longest text the model was made for, or None if unknown.
        options: the names of the options in force that edit logits, and `max_time`.

    Raises:
        ValueError: the schedule asked for, or an option, cannot be had with these prompts.
    """
    counting = [name for name in options if name in COUNTING | {"max_time"}]
    on_ngrams = [name for name in options if name in ON_NGRAMS]
    on_whole_prompts = [name for name in options if name in ON_WHOLE_PROMPTS]
    width = max(lengths) + max(limits)
    fits = context is None or width <= context
    ragged = min(lengths) < max(lengths)
    if asked == "padded" and not fits:
        raise ValueError(
            f'schedule="padded" needs the longest prompt and the most new tokens of any row to fit together in the '
            f'model\'s context of {context} tokens, got {width}: take schedule="reference", or fewer new tokens'
        )
    padded = asked == "padded" or (asked == "auto" and ragged and fits and not on_ngrams)
    if ragged and padded and on_ngrams:
        way_out = "" if on_whole_prompts else 'schedule="reference", or '
        raise ValueError(
            f"{on_ngrams[0]} would count the padding of a ragged batch as text: take {way_out}prompts of one length"
        )
    if ragged and not padded and on_whole_prompts:
        way_out = "" if on_ngrams else 'schedule="padded", or '
        raise ValueError(
            f"{on_whole_prompts[0]} looks at whole prompts, and the reference schedule begins where the shortest "
            f"one of a ragged batch ends: take {way_out}prompts of one length"
        )
    if counting and ragged and not padded:
        raise ValueError(
            f"{counting[0]} counts from where all prompts end, and in the reference schedule a ragged batch has no "
            'such place: take schedule="padded", or prompts of one length'
        )
    return "padded" if padded else "reference"
