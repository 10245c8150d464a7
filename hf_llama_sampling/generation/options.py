"""Sort the keywords of a call to `generate`, and refuse by name those that this sampler does not support.

Every refusal is one sentence: the rule, the value, the row, the way out. What this module does not do: it reads no
prompts and runs nothing.
"""

import difflib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from ..checks import (
    PerRow,
    check_bool,
    check_count,
    check_int,
    check_temperature,
    check_top_p,
    first_not_none,
    per_row,
    to_python,
)
from ..defaults import TEMPERATURE, TOP_P
from .model_info import runs_in_step, scored_size_of
from .option_values import check_option_values
from .pipelines import added_by_a_pipeline
from .releases import CACHE_NAME, CACHE_NAMES

# Options of a generation config, by their use.
# These edit logits to keep a text from ending; without an EOS id they have no effect.
NEEDING_EOS = {"min_length", "min_new_tokens", "exponential_decay_length_penalty"}
# These edit logits. Their processors are made in `edits`, since each must see a row's own text.
EDITING = NEEDING_EOS | {
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "remove_invalid_values",
}
# Values with which an option that edits logits has no effect.
NO_EDIT: dict[str, Any] = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "remove_invalid_values": False,
}
# These choose the cache, which transformers makes.
CACHING = {"cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"}
# Options that are passed to transformers' loop.
FOR_THE_LOOP = CACHING | {
    "use_cache",
    "max_time",
    "compile_config",
    "disable_compile",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
}
# Options that `generate` itself reads.
FOR_GENERATE = EDITING | {
    "do_sample",
    "temperature",
    "top_p",
    "max_length",
    "max_new_tokens",
    "num_return_sequences",
    "return_dict_in_generate",
    "stop_strings",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "transformers_version",
}
# Options that are True or False.
FLAGS = {
    "do_sample",
    "return_dict_in_generate",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "remove_invalid_values",
    "disable_compile",
}
# Values with which an unsupported option has no effect, so that it need not be refused.
NEUTRAL: dict[str, Any] = {
    "top_k": 0,
    "typical_p": 1.0,
    "min_p": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "renormalize_logits": True,
}
# Keywords of transformers' `generate` and of models' `forward` that are not supported.
REFUSED = {
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "inputs_embeds",
    "position_ids",
    "labels",
    "logits_to_keep",
    "cache_position",
    "use_model_defaults",
    "trust_remote_code",
}
# Ways out that are better than "leave it out".
WAYS_OUT = {
    "top_k": "for a top-k before the nucleus pass logits_processor=[TopKLogitsWarper(k)]",
    "min_p": "pass logits_processor=[MinPLogitsWarper(p)]",
    "typical_p": "pass logits_processor=[TypicalLogitsWarper(p)]",
    "epsilon_cutoff": "pass logits_processor=[EpsilonLogitsWarper(e)]",
    "eta_cutoff": "pass logits_processor=[EtaLogitsWarper(e)]",
    "output_scores": "scores are one-hot rows here: ask for logprobs, top_logprobs or output_logits",
    "watermarking_config": "pass logits_processor=[WatermarkLogitsProcessor(...)], which then edits before the draw",
    "negative_prompt_ids": "pass an UnbatchedClassifierFreeGuidanceLogitsProcessor in logits_processor",
    "negative_prompt_attention_mask": "pass an UnbatchedClassifierFreeGuidanceLogitsProcessor in logits_processor",
    "inputs_embeds": "pass token ids",
    "position_ids": "positions follow from the prompts",
}
# What other libraries call it.
_OF_OTHERS = {
    "stop": "stop_strings",
    "stop_sequences": "stop_strings",
    "stop_token_ids": "eos_token_id",
    "stop_token_id": "eos_token_id",
    "n": "num_return_sequences",
    "num_samples": "num_return_sequences",
    "min_tokens": "min_new_tokens",
    "prompt_logprobs": "echo",
    "ignore_eos": "eos_token_id=None",
}
# Inputs of models that read more than token ids, as their processors name them.
_OF_OTHER_MODELS = re.compile("^(pixel|image|video|audio|input_(features|values))|_grid_thw$|token_type_ids$")
# Arguments of transformers' `generate` that are not options of a config.
LOOP_ARGUMENTS = (
    "logits_processor",
    "stopping_criteria",
    "tokenizer",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "streamer",
)


@dataclass
class Call:
    """A call's keywords, sorted by who reads them."""

    options: dict[str, Any] = field(default_factory=dict)  # of generation configs
    from_config: dict[str, Any] = field(default_factory=dict)  # temperature and top_p of a config in the call
    to_loop: dict[str, Any] = field(default_factory=dict)  # arguments of transformers' `generate`
    to_model: dict[str, Any] = field(default_factory=dict)  # arguments of the model's `forward`
    in_config: set[str] = field(default_factory=set)  # options that only a config in the call sets
    from_pipeline: set[str] = field(default_factory=set)  # options that a pipeline adds by itself
    events: Any = None  # an `EventSource` that follows the run
    in_step: bool = False  # whether all processes must forward equally often

    def option(self, name: str, *, beside: Any = None) -> Any:
        """Return an option's value; None if it is a config's or a pipeline's own, and the call gives `beside`."""
        weaker = name in self.in_config or name in self.from_pipeline
        return None if beside is not None and weaker else self.options.get(name)

    def editing(self) -> list[str]:
        """List the options in force that edit logits, sorted by name."""
        return [
            name
            for name in sorted(EDITING)
            if self.options.get(name) is not None and not (name in NO_EDIT and self.options[name] == NO_EDIT[name])
        ]


def sort_keywords(
    model: Any, config: GenerationConfig | None, kwargs: dict[str, Any], own: Sequence[str], *, method: str = "generate"
) -> Call:
    """Sort a call's keywords.

    Config fields that equal `GenerationConfig()`'s defaults count as unset, except `do_sample`.

    Args:
        model: its `forward` says which further keywords there are.
        config: a generation config given in the call.
        kwargs: the call's keywords that `generate` does not spell out.
        own: the names that the method spells out, for the hint at a misspelt one.
        method: its name.

    Raises:
        TypeError: an unknown keyword, or a config of another type.
        ValueError: an option that has no place in this sampler.
    """
    call = _read_config(config)
    defaults = GenerationConfig().to_dict()
    options = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | set(defaults)
    of_forward = set(inspect.signature(model.forward).parameters) - {"kwargs", "args"}
    for name, value in kwargs.items():
        if name in REFUSED:
            if value is not None:
                raise ValueError(_no_place(name, name, method))
        elif name in CACHE_NAMES and of_forward & set(CACHE_NAMES):
            if value is not None and call.to_model.get(CACHE_NAME) is not None:
                raise ValueError("past_key_values and cache are two names of one argument: give one of them")
            call.to_model[CACHE_NAME] = first_not_none(value, call.to_model.get(CACHE_NAME))
        elif name in LOOP_ARGUMENTS:
            call.to_loop[name] = value
        elif name in options:
            # As in transformers, a call's None takes the checkpoint's EOS away.
            call.options[name] = [] if name == "eos_token_id" and value is None else value
            call.in_config.discard(name)
        elif name in of_forward:
            call.to_model[name] = value
        else:
            raise _unknown(name, [*own, *defaults, *of_forward], method, model)
    for name in call.in_config.intersection(own):
        raise ValueError(
            f"{name} must stand in the call of {method}, and a generation_config holds options of transformers: take "
            f"{name}={call.options[name]!r} out of the config"
        )
    _refuse_options_without_a_place(call.options, method)
    _check_kinds(call)
    check_option_values(call.options, scored_size_of(model))
    call.from_pipeline = added_by_a_pipeline()
    call.in_step = runs_in_step(model, call.to_loop.get("synced_gpus"))
    return call


def _unknown(name: str, known: Sequence[str], method: str, model: Any) -> TypeError:
    """Word the refusal of an unknown keyword."""
    near = [_OF_OTHERS[name]] if name in _OF_OTHERS else difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not _OF_OTHER_MODELS.search(name) or (near and _OF_OTHER_MODELS.search(near[0])):
        hint = f"did you mean {near[0]}?" if near else "its docstring lists what it takes"
        return TypeError(f"{method} has no keyword {name!r}: {hint}")
    return TypeError(
        f"{name!r} is an input of other models, and {type(model).__name__}'s forward does not take it: leave it "
        "out, or take a model that reads it"
    )


def _read_config(config: Any) -> Call:
    """Read the options that a config given in the call sets."""
    if config is None:
        return Call()
    if not isinstance(config, GenerationConfig):
        raise TypeError(
            f"generation_config must be a GenerationConfig, got {type(config).__name__}: make one, or pass its options"
        )
    defaults = GenerationConfig().to_dict()
    said = {
        name: value
        for name, value in config.to_dict().items()
        if value is not None and (value != defaults.get(name) or name == "do_sample")
    }
    sampling = {name: said.pop(name) for name in ("temperature", "top_p") if name in said}
    return Call(options=said, from_config=sampling, in_config=set(said))


def _refuse_options_without_a_place(options: dict[str, Any], method: str) -> None:
    """Refuse by name every option in force that this sampler does not support."""
    for name, value in options.items():
        off = value is None or value is False or (name in NEUTRAL and value == NEUTRAL[name])
        if name not in FOR_THE_LOOP | FOR_GENERATE and not off:
            raise ValueError(_no_place(name, f"{name}={value!r}", method))
    if options.get("cache_implementation") == "paged":
        raise ValueError(
            'cache_implementation="paged" ignores logits processors and masks: drop it, or give the warpers to the '
            "continuous batching manager's logit_processor"
        )


def _check_kinds(call: Call) -> None:
    """Refuse objects of the wrong kind, before transformers' loop fails on them in some step."""
    for name in FLAGS:
        if call.options.get(name) is not None:
            check_bool(name, call.options[name])
    for name, call_of in (("logits_processor", "(input_ids, scores)"), ("stopping_criteria", "(input_ids, scores)")):
        given = call.to_loop.get(name)
        if given is not None and not (isinstance(given, (list, tuple)) and all(map(callable, given))):
            raise TypeError(f"{name} must be a list of functions of {call_of}, got {given!r}: wrap one as [function]")
        for one in given or ():
            if isinstance(one, type):
                raise TypeError(
                    f"{name} must be a list of functions of {call_of}, got the class {one.__name__}: make one of it"
                )
    if call.to_loop.get("synced_gpus") is not None:
        check_bool("synced_gpus", call.to_loop["synced_gpus"])
    allowed = call.to_loop.get("prefix_allowed_tokens_fn")
    if allowed is not None and not callable(allowed):
        raise TypeError(f"prefix_allowed_tokens_fn must be a function of (row, input_ids), got {allowed!r}: pass one")
    streamer = call.to_loop.get("streamer")
    if streamer is not None and not (is_object(streamer) and hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(
            f"streamer must have the methods put and end, got {streamer!r}: pass a TextStreamer or the like"
        )
    cache = call.to_model.get(CACHE_NAME)
    if cache is not None and not (is_object(cache) and hasattr(cache, "get_seq_length")):
        raise TypeError(f"past_key_values must be a Cache of transformers, got {type(cache).__name__}: leave it out")
    if hasattr(cache, "cross_attention_cache"):
        raise TypeError(
            f"past_key_values must be a cache of a decoder alone, got {type(cache).__name__}: pass its "
            "self_attention_cache"
        )
    tokenizer = call.to_loop.get("tokenizer")
    if call.options.get("stop_strings") and tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
        raise TypeError(
            f"stop_strings need a tokenizer of transformers, got {type(tokenizer).__name__}: pass the one of the model"
        )


def refuse_caches(call: Call, model: str) -> None:
    """Refuse all that says which cache to use; `model` says of which model it is of no use, and why."""
    asked = [name for name in sorted(CACHING) if call.options.get(name)]
    asked += [CACHE_NAME] if call.to_model.get(CACHE_NAME) is not None else []
    for name in asked:
        raise ValueError(f"{name} has no place beside {model}: call model.eval() before, or leave it out")


def is_object(value: Any) -> bool:
    """Whether this is an object, not a class."""
    return not isinstance(value, type)


def _no_place(name: str, asked: str, method: str) -> str:
    """Word the refusal of an option; `WAYS_OUT` applies to `generate` only, since most name logits processors."""
    way_out = WAYS_OUT.get(name, "leave it out") if method == "generate" else "leave it out"
    return (
        f"{asked} has no place in LLAMA2's sampler: {way_out}, or call transformers' own model class for transformers' "
        "own rule"
    )


def choose_temperature(given: PerRow | None, call: Call) -> float | list[float]:
    """Choose the temperature: the call's, else its config's, else Meta's default; `do_sample=False` means 0."""
    if "temperature" in call.from_pipeline:
        given = None
    do_sample = call.option("do_sample", beside=given)
    if do_sample is False:
        asked = None if given is None else per_row("temperature", given, check_temperature)
        if asked is not None and set(asked if isinstance(asked, list) else [asked]) != {0}:
            raise ValueError(f"do_sample=False means temperature 0, but the call says {given!r}: drop one of the two")
        return 0.0
    value = per_row(
        "temperature", first_not_none(given, _of_config("temperature", call), TEMPERATURE), check_temperature
    )
    if do_sample is True and set(value if isinstance(value, list) else [value]) == {0}:
        raise ValueError(
            "do_sample=True asks to sample, but temperature 0 is greedy: say do_sample=False, which means temperature 0"
        )
    return value


def _of_config(name: str, call: Call) -> Any:
    """A setting of a config in the call; a pipeline writes its own into its user's."""
    return None if name in call.from_pipeline else call.from_config.get(name)


def choose_top_p(given: PerRow | None, call: Call) -> float | list[float]:
    """Choose `top_p`: the call's, else its config's, else Meta's default."""
    return per_row("top_p", first_not_none(given, call.from_config.get("top_p"), TOP_P), check_top_p)


def resolve_alias(name: str, given: Any, alias: str, other: Any) -> Any:
    """Return the value of an argument that has two names."""
    if given is not None and other is not None and to_python(given) != to_python(other):
        values = "" if isinstance(given, Tensor) else f" ({to_python(other)} and {to_python(given)})"
        raise ValueError(f"{alias} means {name}, but they differ{values}: drop one of the two")
    return first_not_none(given, other)


def choose_gen_lens(given: Any, total: int | None, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Read the most new tokens per prompt, as asked.

    Args:
        given: an int or one per prompt, or None if the call limits the total length instead.
        total: the total length that the call gives, or None.
        prompts: the prompts.
    """
    if given is None:
        if total is None:
            raise ValueError(
                "max_gen_len must be given: it is the most new tokens per row (max_new_tokens means the same)"
            )
        return [total - len(prompt) for prompt in prompts]
    given = to_python(given)
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        check_count("max_gen_len", len(given), len(prompts))
        return [check_int("max_gen_len", value, least=0, where=f" for row {row}") for row, value in enumerate(given)]
    return [check_int("max_gen_len", given, least=0)] * len(prompts)
