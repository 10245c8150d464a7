"""The settings of a run as frozen values, checked once when `run` is called.

This module knows neither files nor models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checks import check_bool, check_int, check_temperature, check_top_p
from ..sampling.settings import SamplingSettings
from ..text.stopping import check_strings

SEED_BOUND = 2**64


@dataclass(frozen=True)
class FieldNames:
    """The caller's names for fields of a record.

    Args:
        prompt: the field with the prompt; `prompt`, `prompt_tokens` or `messages` if None.
        id: the field with the id; `id` or one of its usual names if None.
        keep: fields to copy into the response unchanged; True for all fields without a meaning here.

    Raises:
        TypeError: a name is not a text.
        ValueError: one field is to be both prompt and id.
    """

    prompt: str | None = None
    id: str | None = None
    keep: bool | tuple[str, ...] = False

    def __post_init__(self) -> None:
        for name in ("prompt", "id"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name}_field must be the name of a field, got {value!r}")
        if self.prompt is not None and self.prompt == self.id:
            raise ValueError(f"prompt_field and id_field must be two fields, and both are {self.id!r}: name another")
        if isinstance(self.keep, bool):
            return
        names = self.keep
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise TypeError(f"keep_fields must be True, False or a list of names, got {names!r}")
        object.__setattr__(self, "keep", tuple(names))


@dataclass(frozen=True)
class RunSettings:
    """All settings that the responses of a run depend on, besides its input, model and tokenizer.

    Args:
        draw: temperature and `top_p` of records without their own.
        max_gen_len: most new tokens of records without their own.
        seed: the run's; a record's seed is derived from it and from the record.
        score: whether to score the prompts and generate nothing.
        logprobs, prompt_logprobs: whether to return them.
        top_logprobs: number of best tokens to return at each position.
        logprobs_of: ids to return with logprob and rank at each position, for records without their own.
        sampling_logprobs: whether to return logprobs after temperature and after the nucleus, with its mass.
        stop: strings that end an answer, of records without their own.
        stride: how far a window moves over a scored text longer than `max_seq_len`; None to refuse such texts.
        bos: the id before each scored text, for records without their own; False for none. None for prompts as they are
            when generating, where a text's first token is the tokenizer's BOS.
        fields: see `FieldNames`.

    Raises:
        TypeError, ValueError: a value of the wrong type, out of range, or without meaning beside another.
    """

    draw: SamplingSettings = field(default_factory=SamplingSettings)
    max_gen_len: int = 0
    seed: int = 1
    score: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    top_logprobs: int = 0
    logprobs_of: tuple[int, ...] = ()
    sampling_logprobs: bool = False
    stop: tuple[str, ...] = ()
    stride: int | None = None
    bos: int | bool | None = None
    fields: FieldNames = field(default_factory=FieldNames)

    def __post_init__(self) -> None:
        check_temperature(self.draw.temperature)
        check_top_p(self.draw.top_p)
        check_int("max_gen_len", self.max_gen_len, least=0)
        check_seed(self.seed)
        for name in ("score", "logprobs", "prompt_logprobs", "sampling_logprobs"):
            count = getattr(self, name)
            meant = f"top_logprobs={count} returns the {count} best tokens at each position"
            check_bool(name, count, meant if name in ("logprobs", "prompt_logprobs") and _is_count(count) else "")
        check_int("top_logprobs", self.top_logprobs, least=0)
        object.__setattr__(self, "stop", check_strings(self.stop))
        if self.score and (self.logprobs or self.sampling_logprobs):
            raise ValueError("scoring generates nothing that could have logprobs: the prompt's are always returned")
        if self.score and self.stop:
            raise ValueError("scoring generates nothing that a stop string could end: leave stop out")
        for name in ("stride", "bos"):
            if getattr(self, name) is not None and not self.score:
                raise ValueError(f"{name} is of scoring, and this run generates: add score (--score), or leave it out")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings in effect for the manifest, under the names of `run`'s arguments."""
        names = {"prompt_field": self.fields.prompt, "id_field": self.fields.id, "keep_fields": self.fields.keep}
        named = {name: list(value) if isinstance(value, tuple) else value for name, value in names.items() if value}
        common: dict[str, Any] = {
            "mode": "score" if self.score else "generate",
            "top_logprobs": self.top_logprobs,
            **named,
        }
        if self.logprobs_of:
            common["logprobs_of"] = [*self.logprobs_of]
        if self.score:
            # In JSON's values False and the id 0 would be equal.
            bos = {} if self.bos is None else {"bos": "none" if self.bos is False else self.bos}
            return {**common, **bos, **({} if self.stride is None else {"stride": self.stride})}
        return {
            **common,
            "temperature": self.draw.temperature,
            "top_p": self.draw.top_p,
            "max_gen_len": self.max_gen_len,
            "seed": self.seed,
            "logprobs": bool(self.logprobs),
            "prompt_logprobs": bool(self.prompt_logprobs),
            **({"sampling_logprobs": True} if self.sampling_logprobs else {}),
            **({"stop": list(self.stop)} if self.stop else {}),
        }


@dataclass(frozen=True)
class BatchLimits:
    """Limits on the size of a batch, and of a window.

    Args:
        rows: most rows in a batch.
        tokens: most tokens in a batch, rows x (longest prompt + most new tokens); a row alone may have more.
        window: number of records that are ordered together.
    """

    rows: int
    tokens: int
    window: int

    def __post_init__(self) -> None:
        check_int("batch_size", self.rows, least=1)
        check_int("batch_tokens", self.tokens, least=1)
        check_int("window", self.window, least=1)


def check_seed(value: Any) -> int:
    """Check a seed: an int from 0 to 2**64 - 1."""
    return check_int("seed", value, least=0, most=SEED_BOUND - 1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
