"""Six levels of probability, for colours: the same on a terminal and on a page."""

import math

LEAST = (0.5, 0.2, 0.05, 0.01, 0.001, 0.0)  # the least probability of each level, the most probable first
NAMES = ("50% and more", "20% to 50%", "5% to 20%", "1% to 5%", "0.1% to 1%", "below 0.1%")


def level_of(logprob: float) -> int:
    """Return the level of a logprob.

    >>> level_of(math.log(0.6)), level_of(math.log(0.02)), level_of(-20)
    (0, 3, 5)
    """
    probability = math.exp(min(logprob, 0.0))
    return next(level for level, least in enumerate(LEAST) if probability >= least)


def as_percent(logprob: float) -> str:
    """Format the probability to three digits.

    >>> as_percent(math.log(0.5)), as_percent(math.log(0.000123)), as_percent(-40)
    ('50.0%', '0.0123%', '4.25e-16%')
    """
    percent = 100 * math.exp(min(logprob, 0.0))
    if percent >= 1:
        return f"{percent:.3g}%" if percent >= 99.95 else f"{percent:.1f}%"
    return f"{percent:.3g}%"
