"""What a call to `generate` says: sorted, checked, and refused by name where it has no place here.

Every refusal is one sentence: the rule, the value, the row, the way out. What this module does not do: it runs nothing.
"""

import difflib
import inspect
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..checks import PerRow, check_count, check_int, check_temperature, check_top_p, first_not_none, per_row, to_python
from ..defaults import TEMPERATURE, TOP_P

Schedule = Literal["auto", "reference", "padded"]

# Options of a generation config that are handed on to transformers. Some edit logits; some of those count tokens since
# the prompt's end, which all rows must then reach at once, or need the EOS ids, which the loop is not told.
NEEDING_EOS = {"min_length", "min_new_tokens", "exponential_decay_length_penalty"}
COUNTING = NEEDING_EOS | {"forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens"}
EDITING = COUNTING | {
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "guidance_scale",
    "remove_invalid_values",
}
# Some look at whole prompts when the loop begins, where the reference schedule has them as far as the shortest goes;
# some count n-grams, among which left padding would be.
ON_WHOLE_PROMPTS = {"encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "guidance_scale"}
ON_NGRAMS = {"no_repeat_ngram_size", "encoder_no_repeat_ngram_size"}
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
CACHING = {"cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"}
HANDED_ON = (
    (EDITING - NEEDING_EOS)
    | CACHING
    | {
        "use_cache",
        "max_time",
        "compile_config",
        "disable_compile",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
    }
)
READ_HERE = NEEDING_EOS | {
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
# Values with which an option that has no place here does nothing.
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
REFUSED = {
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "inputs_embeds",
    "position_ids",
    "token_type_ids",
    "labels",
    "logits_to_keep",
    "cache_position",
    "use_model_defaults",
    "trust_remote_code",
}
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
    "token_type_ids": "leave it out: prompts are laid out anew here, without it",
}
TO_THE_LOOP = (
    "logits_processor",
    "stopping_criteria",
    "tokenizer",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "streamer",
)


class Call(NamedTuple):
    """A call's keywords, sorted."""

    options: dict[str, Any]  # of generation configs; what a config says of the temperature stands in "config"
    to_loop: dict[str, Any]  # arguments of transformers' `generate`
    to_model: dict[str, Any]  # arguments of the model's `forward`


def sort_keywords(model: Any, config: GenerationConfig | None, kwargs: dict[str, Any], own: Sequence[str]) -> Call:
    """Sort a call's keywords; `own` are the names that `generate` spells out.

    Of a config given in the call, what equals the default of a fresh one counts as not said.
    """
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(
            f"generation_config must be a GenerationConfig, got {type(config).__name__}: make one, or pass its options"
        )
    defaults = GenerationConfig().to_dict()
    said = {
        name: value
        for name, value in (config.to_dict() if config is not None else {}).items()
        if value is not None and (value != defaults.get(name) or name == "do_sample")
    }
    call = Call(options=said, to_loop={}, to_model={})
    call.options["config"] = {name: call.options.pop(name) for name in ("temperature", "top_p") if name in said}
    known_options = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | set(defaults)
    known = set(inspect.signature(model.forward).parameters) - {"kwargs", "args"}
    for name, value in kwargs.items():
        if name in REFUSED:
            if value is not None:
                raise ValueError(_no_place(name, name))
        elif name in TO_THE_LOOP:
            call.to_loop[name] = value
        elif name in known_options:
            call.options[name] = value
        elif name in known:
            call.to_model[name] = value
        else:
            near = difflib.get_close_matches(name, [*own, *defaults, *known], n=1)
            hint = f"did you mean {near[0]}?" if near else "its docstring lists what it takes"
            raise TypeError(f"generate has no keyword {name!r}: {hint}")
    for name, value in call.options.items():
        off = value is None or value is False or (name in NEUTRAL and value == NEUTRAL[name])
        if name not in HANDED_ON | READ_HERE | {"config"} and not off:
            raise ValueError(_no_place(name, f"{name}={value!r}"))
    if call.options.get("cache_implementation") == "paged":
        raise ValueError(
            'cache_implementation="paged" ignores logits processors and masks: drop it, or give the warpers to the '
            "continuous batching manager's logit_processor"
        )
    return call


def _no_place(name: str, asked: str) -> str:
    return (
        f"{asked} has no place in LLAMA2's sampler: {WAYS_OUT.get(name, 'leave it out')}, or call transformers' own "
        "model class for transformers' own rule"
    )


def choose_temperature(given: PerRow | None, options: dict[str, Any]) -> float | list[float]:
    """From the call, else from a config given in the call, else Meta's default; `do_sample=False` means 0."""
    do_sample = options.get("do_sample")
    if do_sample is False:
        asked = None if given is None else per_row("temperature", given, check_temperature)
        if asked is not None and set(asked if isinstance(asked, list) else [asked]) != {0}:
            raise ValueError(f"do_sample=False means temperature 0, but the call says {given!r}: drop one of the two")
        return 0.0
    value = per_row(
        "temperature", first_not_none(given, options["config"].get("temperature"), TEMPERATURE), check_temperature
    )
    if do_sample is True and set(value if isinstance(value, list) else [value]) == {0}:
        raise ValueError(
            "do_sample=True asks to sample, but temperature 0 is greedy: say do_sample=False, which means temperature "
            "0 (a pipeline adds do_sample=True by itself)"
        )
    return value


def choose_top_p(given: PerRow | None, options: dict[str, Any]) -> float | list[float]:
    """From the call, else from a config given in the call, else Meta's default."""
    return per_row("top_p", first_not_none(given, options["config"].get("top_p"), TOP_P), check_top_p)


def resolve_alias(name: str, given: Any, alias: str, other: Any) -> Any:
    """The value of an argument that has two spellings."""
    if given is not None and other is not None and to_python(given) != to_python(other):
        values = "" if isinstance(given, Tensor) else f" ({to_python(other)} and {to_python(given)})"
        raise ValueError(f"{alias} means {name}, but they differ{values}: drop one of the two")
    return first_not_none(given, other)


def check_lengths(prompts: Sequence[Sequence[int]], most: int | None, *, name: str = "max_seq_len") -> None:
    """No prompt is cut silently."""
    for row, prompt in enumerate(prompts):
        if most is not None and len(prompt) > most:
            raise ValueError(
                f"a prompt must fit {name} of {most} tokens, but row {row} has {len(prompt)}: shorten or split it"
            )


def gen_lens(given: Any, max_seq_len: int | None, by_length: bool, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Most new tokens per prompt. `by_length`: the call limits the total length instead."""
    if given is None:
        if not by_length or max_seq_len is None:
            raise ValueError(
                "max_gen_len must be given: it is the most new tokens per row (max_new_tokens means the same)"
            )
        return [max_seq_len - len(prompt) for prompt in prompts]
    given = to_python(given)
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        check_count("max_gen_len", len(given), len(prompts))
        return [check_int("max_gen_len", value, least=0, where=f" for row {row}") for row, value in enumerate(given)]
    return [check_int("max_gen_len", given, least=0)] * len(prompts)


def take_prompts(inputs: Any, attention_mask: Any, vocab_size: int) -> tuple[bool, list[list[int]]]:
    """Whether prompts came as a tensor, and the prompts as lists of ids, without padding."""
    if inputs is None:
        raise ValueError(
            "generate needs prompts: lists of token ids, or a tensor of shape (B, T) with its attention_mask"
        )
    if isinstance(inputs, str) or (isinstance(inputs, Sequence) and any(isinstance(row, str) for row in inputs)):
        raise TypeError("prompts must be token ids, got text: encode it with the tokenizer first")
    was_tensor = isinstance(inputs, Tensor)
    if was_tensor:
        prompts = _rows_of_tensor(inputs, attention_mask)
    elif isinstance(inputs, Sequence):
        if attention_mask is not None:
            raise ValueError(
                "attention_mask goes with a tensor; prompts given as lists carry their own lengths: drop it"
            )
        prompts = [_row_of_list(row, prompt) for row, prompt in enumerate(inputs)]
    else:
        raise TypeError(
            f"prompts must be lists of token ids or a tensor of shape (B, T), got {type(inputs).__name__}: "
            "pass tokenizer(...)['input_ids'] and its attention_mask"
        )
    if not prompts:
        raise ValueError("a batch must hold at least one prompt, got none")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"a prompt must hold at least one token, but row {row} is empty: start it with BOS")
        for position, token in enumerate(prompt):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"token ids must lie in [0, {vocab_size}), got {token} at position {position} of row {row}: "
                    "check that tokenizer and model belong together"
                )
    return was_tensor, prompts


def _row_of_list(row: int, prompt: Any) -> list[int]:
    if isinstance(prompt, int):
        raise TypeError(
            "prompts must be a list of lists of token ids, got a list of ids: wrap a single prompt as [prompt]"
        )
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence):
        raise TypeError(f"a prompt must be a list of token ids, got {type(prompt).__name__} for row {row}")
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise TypeError(f"token ids must be ints, got {prompt!r} for row {row}") from None


def _rows_of_tensor(inputs: Tensor, mask: Any) -> list[list[int]]:
    if inputs.dim() != 2 or inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool:
        raise ValueError(
            f"a tensor of prompts must be integers of shape (B, T), got {inputs.dtype} of shape {tuple(inputs.shape)}: "
            "a single prompt is inputs[None]"
        )
    if mask is None:
        return [list(row) for row in inputs.tolist()]
    mask = torch.as_tensor(mask)
    if mask.shape != inputs.shape:
        raise ValueError(
            f"attention_mask must have the prompts' shape, got {tuple(mask.shape)} for {tuple(inputs.shape)}"
        )
    prompts = []
    for row, (ids, seen) in enumerate(zip(inputs.tolist(), mask.tolist(), strict=True)):
        odd = next((value for value in seen if value not in (0, 1)), None)
        if odd is not None:
            raise ValueError(f"attention_mask must hold 0 and 1 only, got {odd} in row {row}")
        real = [position for position, value in enumerate(seen) if value]
        if real and real[-1] - real[0] + 1 != len(real):
            raise ValueError(
                f"attention_mask must be one run of ones per row, but row {row} has a hole: pad on one side only"
            )
        prompts.append([ids[position] for position in real])
    return prompts


def options_that_edit(options: dict[str, Any]) -> list[str]:
    """The options in force that edit logits."""
    return [
        name
        for name in sorted(EDITING)
        if options.get(name) is not None and not (name in NO_EDIT and options[name] == NO_EDIT[name])
    ]


def choose_schedule(
    asked: Schedule, lengths: Sequence[int], limits: Sequence[int], context: int | None, editing: Sequence[str]
) -> Literal["reference", "padded"]:
    """Padded where the batch is ragged and fits the model's context that way, reference otherwise.

    Beyond the context a padded batch would put rows that are done, and wait for others, at positions the model has not.
    `editing` are the options in force that edit logits, and max_time: those on n-grams would count padding as text,
    those on whole prompts would see cut ones in reference, those that count from the prompts' end need all prompts to
    end in one column.
    """
    counting = [name for name in editing if name in COUNTING | {"max_time"}]
    on_ngrams = [name for name in editing if name in ON_NGRAMS]
    on_whole_prompts = [name for name in editing if name in ON_WHOLE_PROMPTS]
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


def check_generator(generator: Any, device: torch.device) -> None:
    """A generator draws on its own device only."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, got {generator!r}: pass torch.Generator(device).manual_seed(...), "
            "or seeds= for one stream per prompt"
        )
    if generator.device.type != device.type:
        raise ValueError(
            f"generator must live on the model's device {device}, got one on {generator.device}: make it with "
            f"torch.Generator({device.type!r})"
        )


def check_cache(cache: Any, columns: int) -> None:
    """A cache of earlier columns comes with the whole text, of which at least the last token is new."""
    held = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    if held >= columns:
        raise ValueError(
            f"past_key_values must hold fewer tokens than the prompts, got {held} for prompts of {columns}: pass the "
            "whole text, what the cache holds included"
        )


def repeat_interleave(values: Sequence[Any], copies: int) -> list[Any]:
    """Each value so many times, as `num_return_sequences` repeats prompts: `[a, b]` twice is `[a, a, b, b]`."""
    return [value for value in values for _ in range(copies)]


def repeat_setting(name: str, value: float | list[float], copies: int, rows: int) -> float | list[float]:
    """A setting given once, or per prompt, as one given once or per row."""
    if not isinstance(value, list):
        return value
    check_count(name, len(value), rows // copies)
    return value[0] if len(set(value)) == 1 else repeat_interleave(value, copies)


def vocab_size_of(model: Any) -> int:
    """The ids that the model can embed."""
    return int(model.config.get_text_config().vocab_size)


def context_of(model: Any) -> int | None:
    """The longest text the model was made for, or None where its config does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)


def device_of(model: Any) -> torch.device:
    """Where token ids go. An offloaded embedding is on no device: accelerate runs it where the first real one is."""
    if model.device.type != "meta":
        return torch.device(model.device)
    placed = [where for where in getattr(model, "hf_device_map", {}).values() if where not in ("cpu", "disk")]
    return torch.device(placed[0] if placed else "cpu")


def eos_ids_of(model: Any, options: dict[str, Any]) -> tuple[int, ...]:
    """From the call, else from the checkpoint. A text may have several, or none."""
    ids = first_not_none(
        options.get("eos_token_id"),
        model.generation_config.eos_token_id,
        getattr(model.config.get_text_config(), "eos_token_id", None),
        (),
    )
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    ids = tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)
    return tuple(check_int("eos_token_id", token, least=0, most=vocab_size_of(model) - 1) for token in ids)


def refuse_encoder_decoder(model: Any) -> None:
    """LLAMA2's loop continues its own prompt; an encoder-decoder has none to continue."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"LLAMA2's generation needs a decoder-only model, but {type(model).__name__} is an encoder-decoder: use "
            "its own generate with LlamaTemperatureLogitsWarper and LlamaTopPLogitsWarper"
        )
