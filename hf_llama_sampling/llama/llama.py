"""The `llama`-compatible API: `Llama` with `build`, `generate`, `text_completion` and `chat_completion`.

A script written for ``from llama import Llama, Dialog`` changes that one line. What this module does not do: it never
looks at logits; `generation` does the work, and this turns text into token ids and back.
"""

import functools
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypedDict, overload

import torch
from transformers import PreTrainedModel

from ..checks import ReferenceAssertion, check_bool, check_choice, check_int, check_seeds
from ..defaults import SAMPLING_LOGPROBS, TEMPERATURE, TOP_P
from ..generation.events import Decoders, TokenEvent
from ..generation.model_info import (
    check_positions,
    context_of,
    eos_ids_of,
    refuse_encoder_decoder,
    refuse_wrapper,
    vocab_size_of,
)
from ..generation.outputs import LlamaGenerateOutput
from ..generation.prompt_cache import PromptCache
from ..generation.schedule import Schedule
from ..generation.scoring import NamedLogprobs, TopLogprobs
from ..generation.streaming import stream_events
from ..generation.trimming import Compat
from ..text.openai import completions
from ..text.stopping import Stop, StopStrings, TextOf
from ..text.tokens import TokenSpeller
from .dialog import (
    UNSAFE_ERROR,
    Dialog,
    Message,
    check_template_messages,
    dialog_tokens,
    is_unsafe,
    with_plain_contents,
)
from .infilling import InfillingPrediction, continuing_text, infilling_ids, infilling_tokens, token_pieces
from .inputs import as_dialogs, as_rows, as_texts
from .loading import check_checkpoint, load_model, load_tokenizer, load_tokenizer_beside, vocab_sizes
from .named_tokens import LogprobsOf, named_ids
from .placement import DeviceMap, MaxMemory, choose_placement
from .reference_model import with_reference_interface
from .tokenizer import TokenizerLike, TransformersTokenizer

ChatFormat = Literal["auto", "llama2", "template"]

_WithDetails = tuple[list[list[int]], list[list[float]] | None, dict[str, list[Any]]]
_FLAG_WAY_OUT = "for the best tokens at each place give top_logprobs=k"


class _Completion(TypedDict):
    generation: str


class CompletionPrediction(_Completion, total=False):
    """The answer of `text_completion` to a prompt; all but `generation` where asked for, `tokens` one string each."""

    tokens: list[str]
    ids: list[int]
    bytes: list[list[int]]
    finish_reason: str | None
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    logprobs_of: list[NamedLogprobs]
    temperature_logprobs: list[float]
    sampled_logprobs: list[float]
    nucleus_mass: list[float]
    stop_reason: str | None


class _Chat(TypedDict):
    generation: Message


class ChatPrediction(_Chat, total=False):
    """The answer of `chat_completion` to a dialog; all but `generation` where asked for, `tokens` one string each."""

    tokens: list[str]
    ids: list[int]
    bytes: list[list[int]]
    finish_reason: str | None
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    logprobs_of: list[NamedLogprobs]
    temperature_logprobs: list[float]
    sampled_logprobs: list[float]
    nucleus_mass: list[float]
    stop_reason: str | None


class Llama:
    """A model and a tokenizer behind the interface of facebookresearch/llama, ``llama/generation.py``.

    - Same arguments, same defaults, same results; where the reference asserts, a `ValueError` that is an
      `AssertionError` too names the rule.
    - `model` is a transformers model that shares its weights with the one given, with the reference's
      `forward(tokens, start_pos)` and `params` (see `reference_model`).
    - Random numbers come from torch's global generator, so that `torch.manual_seed(s)` gives the reference's tokens.
    - The reference's own schedule is the default; `schedule="auto"` answers ragged batches faster, with the same tokens
      up to the rounding of the logits.
    - With `keep_cache` the cache of a call is kept, so that a conversation's next turn reads only what is new.

    Args:
        model: any decoder-only causal language model of transformers.
        tokenizer: anything with Meta's five members, or a transformers tokenizer.
        max_seq_len: most tokens per row, prompt included; the model's context if not given.
        max_batch_size: most rows per call; no limit if not given.
        compat: `"meta"` keeps the reference's quirks, `"fixed"` mends them (docs/coming-from-llama.md has the table).
        schedule: see `LlamaGenerationMixin.generate`.
        keep_cache: whether calls keep what they have read for the next one (see `PromptCache`): the same tokens up to
            the rounding of the logits. If not given, they do unless the schedule is the reference's, which is bit for
            bit. `prompt_cache.clear()` frees it; a call lets go of what its prompts have no use for before it begins.

    Raises:
        ValueError: the tokenizer's vocabulary is larger than the model's, or a value is out of range.
        TypeError: `model` is no model.

    >>> llama = Llama(LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    >>> llama.max_seq_len
    512
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_seq_len: int | None = None,
        max_batch_size: int | None = None,
        compat: Compat = "meta",
        schedule: Schedule = "reference",
        keep_cache: bool | None = None,
    ) -> None:
        _check_model(model)
        _check_limits(max_seq_len, max_batch_size, compat, schedule)
        check_positions(model, max_seq_len, "max_seq_len")
        self.tokenizer: TokenizerLike = load_tokenizer(tokenizer)
        _check_sizes(self.tokenizer, vocab_size_of(model))
        length = context_of(model) if max_seq_len is None else max_seq_len
        if length is None:
            raise ValueError("max_seq_len must be given: the model's config names no context length")
        self.max_seq_len = int(length)
        self.max_batch_size = None if max_batch_size is None else int(max_batch_size)
        self.compat: Compat = compat
        self.schedule: Schedule = schedule
        self.prompt_cache = PromptCache() if _keeps_cache(keep_cache, schedule) else None
        self.model: Any = with_reference_interface(model, self._params(model))

    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: Any,
        max_seq_len: int | None,
        max_batch_size: int | None,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        dtype: torch.dtype | str | None = None,
        device_map: DeviceMap | None = None,
        max_memory: MaxMemory | None = None,
        offload_folder: str | Path | None = None,
        compat: Compat = "meta",
        schedule: Schedule = "reference",
        keep_cache: bool | None = None,
    ) -> "Llama":
        """Load a checkpoint and its tokenizer, and seed torch's global generator.

        Args:
            ckpt_dir: Meta's own folder (`params.json`, `consolidated.*.pth`, however many shards), a transformers
                folder, a Hub id, a GGUF file (or a folder that holds one), or the folder of an adapter of PEFT.
            tokenizer_path: a SentencePiece file, a transformers tokenizer, or where to find one.
            max_seq_len: most tokens per row, prompt included; None for the checkpoint's context, or LLAMA2's 4,096
                where, as in Meta's format, the checkpoint does not say.
            max_batch_size: most rows per call; None for no limit.
            model_parallel_size: how many GPUs to use. Shards are merged whatever it says; without GPUs it is moot.
            seed: for `torch.manual_seed`, as in the reference.
            dtype: float16 on GPUs and float32 on CPU if not given; `"auto"` for the checkpoint's own.
            device_map: where accelerate puts the model: `"auto"`, a device, or a mapping of modules with `"cpu"` and
                `"disk"` for offload. The first GPU if there is one, else the CPU, if not given.
            max_memory: what `"auto"` may use of each device.
            offload_folder: for modules on `"disk"`; a temporary folder if not given.
            compat, schedule, keep_cache: see `Llama`.

        Returns:
            The `Llama`; the time that loading took is printed, as in the reference.

        Raises:
            FileNotFoundError: there is no such checkpoint or tokenizer, or a part of it is missing.
            ValueError: a checkpoint that cannot be read without running code, parts that contradict one another, or a
                device that this machine does not have.

        >>> llama = Llama.build(folder, folder, max_seq_len=128, max_batch_size=4)
        Loaded in ... seconds
        >>> llama.model.params.n_layers, llama.tokenizer.n_words
        (4, 1024)
        """
        start = time.time()
        _check_limits(max_seq_len, max_batch_size, compat, schedule)
        _keeps_cache(keep_cache, schedule)
        torch.manual_seed(check_int("seed", seed, least=-(2**63), most=2**64 - 1))
        placement = choose_placement(dtype, device_map, max_memory, offload_folder, model_parallel_size)
        check_checkpoint(ckpt_dir)
        tokenizer = load_tokenizer_beside(ckpt_dir, tokenizer_path)
        model = load_model(ckpt_dir, placement, max_seq_len=max_seq_len, tokenizer=tokenizer)
        limits: dict[str, Any] = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        llama = Llama(model, tokenizer, **limits, compat=compat, schedule=schedule, keep_cache=keep_cache)
        print(f"Loaded in {time.time() - start:.2f} seconds")
        return llama

    @overload
    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = ...,
        top_p: float = ...,
        logprobs: bool = ...,
        echo: bool = ...,
        stop_token: int | None = ...,
        *,
        seeds: int | Sequence[int] | None = ...,
        streamer: Any = ...,
        stopping_criteria: Any = ...,
        prompt_cache: PromptCache | None = ...,
    ) -> tuple[list[list[int]], list[list[float]] | None]: ...
    @overload
    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = ...,
        top_p: float = ...,
        logprobs: bool = ...,
        echo: bool = ...,
        stop_token: int | None = ...,
        *,
        seeds: int | Sequence[int] | None = ...,
        top_logprobs: int = ...,
        logprobs_of: LogprobsOf | None = ...,
        sampling_logprobs: bool = ...,
        details: bool = ...,
        streamer: Any = ...,
        stopping_criteria: Any = ...,
        prompt_cache: PromptCache | None = ...,
    ) -> _WithDetails: ...
    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        logprobs: bool = False,
        echo: bool = False,
        stop_token: int | None = None,
        *,
        seeds: int | Sequence[int] | None = None,
        top_logprobs: int = 0,
        logprobs_of: LogprobsOf | None = None,
        sampling_logprobs: bool = False,
        details: bool = False,
        streamer: Any = None,
        stopping_criteria: Any = None,
        prompt_cache: PromptCache | None = None,
    ) -> tuple[list[list[int]], list[list[float]] | None] | _WithDetails:
        """Complete a ragged batch of token-id prompts.

        Args:
            prompt_tokens: lists of ids, each of 1 to `max_seq_len` tokens.
            max_gen_len: most new tokens per row.
            temperature: 0 is greedy.
            top_p: the nucleus.
            logprobs: whether to return each token's raw logprob, natural logarithm.
            echo: whether the answers start with their prompts.
            stop_token: the id that ends a row instead of EOS, as in Code Llama's package.
            seeds: one stream of random numbers per prompt: an int (`seed, seed + 1, ...`) or one per prompt. A prompt's
                completion then depends on nothing else in the batch.
            top_logprobs: how many best tokens to return at each position.
            logprobs_of: tokens whose raw logprobs and ranks to return at each position: ids, or texts of one token as
                they stand within a text (`" Yes"` is another than `"Yes"`), in one list for all prompts or one per
                prompt. Rank 1 is the most probable token; of equals the lower id comes first.
            sampling_logprobs: whether to return the raw logprobs, those after temperature, those after the nucleus, and
                the nucleus' mass.
            details: whether to return why each row ended.
            streamer: gets the tokens as they come, as transformers' streamers do.
            stopping_criteria: transformers' criteria that end rows.
            prompt_cache: what earlier calls have read, instead of this object's own (`keep_cache` of `Llama`).

        Returns:
            Ids per row, cut before EOS, and logprobs beside them, or None. With `top_logprobs`, `logprobs_of`,
            `sampling_logprobs` or `details` also a dict with `"top_logprobs"` (per token a list of `(id, logprob)`),
            `"logprobs_of"` (of `(id, logprob, rank)`), `"temperature_logprobs"`, `"sampled_logprobs"` and
            `"nucleus_mass"`, as far as asked for, beside the ids too, and `"finish_reason"`, one per row.

        Raises:
            ValueError: the batch is larger than `max_batch_size`, a prompt is empty or longer than `max_seq_len`, or a
                value is out of range.
            TypeError: a value of another type, such as `logprobs=5`.

        >>> llama.generate([[1, 367, 542], [1]], max_gen_len=4, temperature=0.0)
        ([[988, 13, 985, 982], [323, 362, 1017, 633]], None)
        """
        if max_gen_len is None:
            raise TypeError("max_gen_len must be an int, got None: give the most new tokens per row")
        flags = _flags(logprobs, echo, sampling_logprobs)
        prompts = as_rows(prompt_tokens)
        self._check_batch(prompts)
        rows = len(prompts) if hasattr(prompts, "__len__") else 1  # what has no length is refused by the engine
        named = named_ids(logprobs_of, rows, self.tokenizer)
        output: LlamaGenerateOutput = self.model.generate(
            prompts,
            return_dict_in_generate=True,
            max_seq_len=self.max_seq_len,
            eos_token_id=self._ends(stop_token),
            compat=self._compat(echo=flags["echo"]),
            schedule=self.schedule,
            max_gen_len=max_gen_len,
            temperature=temperature,
            top_p=top_p,
            seeds=seeds,
            top_logprobs=top_logprobs,
            logprobs_of=named,
            prompt_cache=self.prompt_cache if prompt_cache is None else prompt_cache,
            **flags,
            **_given(streamer=streamer, stopping_criteria=stopping_criteria),
        )
        assert output.tokens is not None
        fields = _score_fields(flags, top=bool(top_logprobs), named=logprobs_of is not None)
        nothing_named: list[list[Any]] = [[[] for _ in row] for row in output.tokens]
        scores: dict[str, Any] = {name: getattr(output, name) or nothing_named for name in fields}
        scores |= {"finish_reason": output.finish_reason} if check_bool("details", details) else {}
        values = scores.pop("logprobs", None)
        return (output.tokens, values, scores) if scores else (output.tokens, values)

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seeds: int | Sequence[int] | None = None,
        stop: Stop | None = None,
        top_logprobs: int = 0,
        logprobs_of: LogprobsOf | None = None,
        sampling_logprobs: bool = False,
        details: bool = False,
        continuing: bool = False,
        streamer: Any = None,
    ) -> list[CompletionPrediction]:
        """Complete texts, each after a BOS if the tokenizer has one.

        Args:
            prompts: texts, in a list or anything else that holds them in order. Control tokens that a text spells out
                are characters.
            max_gen_len: `max_seq_len - 1` if not given.
            stop: strings that end a completion: one or several for all prompts, or a list per prompt. The text is cut
                right before the first; tokens and logprobs are those of the tokens that lie wholly before it. A string
                may spell control tokens (`"<|im_end|>"`), which the text leaves out.
            details: whether to return each token's id and bytes, and why the completion ended.
            continuing: whether prompt and `generation` add up to the decoded whole. If not, a completion is decoded
                alone, as in the reference, and a SentencePiece tokenizer then drops the space that it begins with.
            others: see `generate`.

        Returns:
            Per prompt `{"generation": text}`, with `logprobs` also `"tokens"`, one string each, and `"logprobs"`, with
            `stop` also `"stop_reason"`: the string that ended the text, or None. `top_logprobs`, `logprobs_of` and
            `sampling_logprobs` add `"tokens"` and fields of the names that `generate` says, `details` adds `"tokens"`,
            `"ids"`, `"bytes"` (a list of ints per token) and `"finish_reason"` (`"stop"` or `"length"`).

        Raises:
            ValueError, TypeError: as `generate`; or a prompt is no text, or a stop string is empty.

        >>> llama.text_completion(["ROMEO:"], temperature=0.0, max_gen_len=8)
        [{'generation': '\\nIf I have been a b'}]
        """
        ids = [self._encode(text, row) for row, text in enumerate(as_texts(prompts))]
        stops = self._stops(stop, len(ids))
        decoders = self._decoders(ids, continuing=check_bool("continuing", continuing))
        answers = self.generate(
            prompt_tokens=ids,
            max_gen_len=self._gen_len(max_gen_len),
            temperature=temperature,
            top_p=top_p,
            logprobs=logprobs,
            echo=echo,
            **_given(seeds=seeds, streamer=streamer, stopping_criteria=_criteria(stops, ids, decoders)),
            **_asked_beside(
                logprobs_of, sampling_logprobs=sampling_logprobs, top_logprobs=top_logprobs, details=details
            ),
        )
        given = [len(prompt) if echo else 0 for prompt in ids]
        predictions: list[CompletionPrediction] = []
        for row, (answer, row_scores) in enumerate(_rows_with_scores(*answers)):
            text, more = self._answer(row, answer, row_scores, given[row], stops, decoders[row])
            predictions.append({"generation": text, **more})  # type: ignore[typeddict-item]
        return predictions

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        chat_format: ChatFormat | None = None,
        seeds: int | Sequence[int] | None = None,
        stop: Stop | None = None,
        top_logprobs: int = 0,
        logprobs_of: LogprobsOf | None = None,
        sampling_logprobs: bool = False,
        details: bool = False,
    ) -> list[ChatPrediction]:
        """Answer dialogs: an optional system message, then user and assistant in turn, the last from the user.

        LLAMA2's chat format is the default. A dialog that contains one of its tags is unsafe and is answered with a
        fixed sentence. With `compat="meta"` it is generated all the same, as in the reference, and its tokens are
        returned with `logprobs`; with `compat="fixed"` it is not generated, and they are empty.

        Args:
            dialogs: lists of messages, in a list or anything else that holds them in order. A content is a text, or a
                list of text parts as OpenAI's API takes them.
            max_gen_len: `max_seq_len - 1` if not given.
            chat_format: `"llama2"`, the `"template"` that the tokenizer came with, or `"auto"`: the template where
                there is one. If not given LLAMA2's, with a warning where the tokenizer came with another.
            stop: see `text_completion`.
            others: see `generate`.

        Returns:
            Per dialog `{"generation": {"role": "assistant", "content": text}}`, with `logprobs` also `"tokens"`, one
            string each, and `"logprobs"`, with `stop` also `"stop_reason"`, and the fields of `top_logprobs`,
            `logprobs_of`, `sampling_logprobs` and `details` as from `text_completion`. What was not generated has no
            `"finish_reason"` (None).

        Raises:
            ValueError, TypeError: as `generate`; or a dialog breaks a rule of the format: both are named.

        >>> dialog = [{"role": "user", "content": "Who is there?"}]
        >>> llama.chat_completion([dialog], temperature=0.0, max_gen_len=6)
        [{'generation': {'role': 'assistant', 'content': '.'}}]
        """
        listed = as_dialogs(dialogs)
        template = self._uses_template(chat_format)
        unsafe = [not template and is_unsafe(with_plain_contents(dialog), row=row) for row, dialog in enumerate(listed)]
        asked = [row for row, flagged in enumerate(unsafe) if self.compat == "meta" or not flagged]
        ids = [self._encode_dialog(listed[row], template=template, row=row) for row in asked]
        given = self._stops(stop, len(listed))
        stops = None if given is None else given.of_rows(asked)
        flags, named = _flags(logprobs, False, sampling_logprobs), named_ids(logprobs_of, len(listed), self.tokenizer)
        decoders = self._decoders(ids, continuing=False)
        answers: dict[int, tuple[str, dict[str, Any]]] = {}
        if ids or not listed:
            row_seeds = None if seeds is None else [check_seeds(seeds, len(listed))[row] for row in asked]
            generated = self.generate(
                prompt_tokens=ids,
                max_gen_len=self._gen_len(max_gen_len),
                temperature=temperature,
                top_p=top_p,
                logprobs=logprobs,
                **_given(seeds=row_seeds, stopping_criteria=_criteria(stops, ids, decoders)),
                **_asked_beside(
                    None if named is None else [named[row] for row in asked],
                    sampling_logprobs=sampling_logprobs,
                    top_logprobs=top_logprobs,
                    details=details,
                ),
            )
            rows = enumerate(_rows_with_scores(*generated))
            answers = {
                asked[i]: self._answer(i, answer, row_scores, 0, stops, decoders[i]) for i, (answer, row_scores) in rows
            }
        fields = _score_fields(flags, top=bool(top_logprobs), named=named is not None)
        nothing = _nothing_generated(fields, stop, details=check_bool("details", details))
        return [_chat_prediction(*answers.get(row, ("", nothing)), unsafe=bad) for row, bad in enumerate(unsafe)]

    def stream_completion(
        self,
        prompts: Sequence[str],
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        top_logprobs: int = 0,
        logprobs_of: LogprobsOf | None = None,
        sampling_logprobs: bool = False,
        seeds: int | Sequence[int] | None = None,
        stop: Stop | None = None,
        continuing: bool = False,
    ) -> Iterator[TokenEvent]:
        """The completions of texts as their tokens come.

        Args:
            top_logprobs: how many best tokens each event names.
            others: see `text_completion`.

        Returns:
            an iterator of [`TokenEvent`]: `row`, `id`, `text`, and where asked for `logprob`, `top`, `logprobs_of`,
            `temperature_logprob`, `sampled_logprob` and `nucleus_mass`; and for each prompt at its end one with `id`
            None, the `finish_reason` and the `stop_reason`. A prompt's texts add up to the `generation` of
            `text_completion`. Nothing runs before the first event is asked for, and closing the
            iterator ends the run.

        Raises:
            ValueError, TypeError: as `text_completion`; of values that the model must judge, with the first event.

        >>> for event in llama.stream_completion(["ROMEO:"], temperature=0.0, max_gen_len=4):
        ...     print(repr(event.text), event.finish_reason)
        '\\n' None
        'I' None
        'f' None
        ' I' None
        '' length
        """
        ids = [self._encode(text, row) for row, text in enumerate(as_texts(prompts))]
        flags = _flags(logprobs, echo, sampling_logprobs)
        # With echo a text is decoded as a whole, so the completion in it goes on from its prompt.
        continuing = check_bool("continuing", continuing) or flags["echo"]
        return self._stream(
            ids,
            stop,
            continuing=continuing,
            max_gen_len=self._gen_len(max_gen_len),
            temperature=temperature,
            top_p=top_p,
            top_logprobs=top_logprobs,
            logprobs_of=logprobs_of,
            seeds=seeds,
            **flags,
        )

    def completions(
        self,
        prompts: Sequence[str],
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_gen_len: int | None = None,
        logprobs: int | None = None,
        echo: bool = False,
        *,
        seeds: int | Sequence[int] | None = None,
        stop: Stop | None = None,
    ) -> dict[str, Any]:
        """Complete texts, and answer in the completions format of OpenAI's API.

        Args:
            logprobs: how many best tokens to name beside each token's logprob, as in that API; None for no logprobs.
            others: see `text_completion`.

        Returns:
            what `LlamaGenerateOutput.to_openai` describes. Texts go on from their prompts, the space included that a
            completion begins with; a choice has a `stop_reason`, the stop string that ended it, or None.

        Raises:
            ValueError, TypeError: as `text_completion`.

        >>> answer = llama.completions(["ROMEO:"], temperature=0.0, max_gen_len=4, logprobs=0)
        >>> answer["choices"][0]["logprobs"]["tokens"]
        ['\\n', 'I', 'f', ' I']
        """
        ids = [self._encode(text, row) for row, text in enumerate(as_texts(prompts))]
        self._check_batch(ids)
        top = 0 if logprobs is None else check_int("logprobs", logprobs, least=0)
        stops = self._stops([] if stop is None else stop, len(ids))
        echo = check_bool("echo", echo, "the answers then start with their prompts")
        decoders = self._decoders(ids, continuing=True)
        output: LlamaGenerateOutput = self.model.generate(
            ids,
            return_dict_in_generate=True,
            max_gen_len=self._gen_len(max_gen_len),
            temperature=temperature,
            top_p=top_p,
            max_seq_len=self.max_seq_len,
            eos_token_id=self.eos_ids,
            compat="fixed",
            schedule=self.schedule,
            seeds=seeds,
            echo=echo,
            logprobs=logprobs is not None,
            top_logprobs=top,
            **_given(stopping_criteria=_criteria(stops, ids, decoders)),
        )
        choices = []
        for row, choice in enumerate(output.choices(self.speller)):
            given = len(ids[row]) if echo else 0
            cut = stops.cut(row, choice.ids[given:], decoders[row])
            choices.append(choice.cut_at(given + cut.tokens, cut.dropped, cut.reason))
        return completions(choices, self.speller, type(self.model).__name__)

    def stream_chat(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        chat_format: ChatFormat | None = None,
        top_logprobs: int = 0,
        logprobs_of: LogprobsOf | None = None,
        sampling_logprobs: bool = False,
        seeds: int | Sequence[int] | None = None,
        stop: Stop | None = None,
    ) -> Iterator[TokenEvent]:
        """The answers to dialogs as their tokens come: see `chat_completion` and `stream_completion`.

        Raises:
            ValueError: a dialog is unsafe; `chat_completion` answers it with a fixed sentence.
        """
        listed = as_dialogs(dialogs)
        template = self._uses_template(chat_format)
        for row, dialog in enumerate(listed):
            if not template and is_unsafe(with_plain_contents(dialog), row=row):
                raise ValueError(f"a dialog must hold none of LLAMA2's tags, and dialog {row} does: {UNSAFE_ERROR}")
        return self._stream(
            [self._encode_dialog(dialog, template=template, row=row) for row, dialog in enumerate(listed)],
            stop,
            continuing=False,
            max_gen_len=self._gen_len(max_gen_len),
            temperature=temperature,
            top_p=top_p,
            top_logprobs=top_logprobs,
            logprobs_of=logprobs_of,
            seeds=seeds,
            **_flags(logprobs, False, sampling_logprobs),
        )

    def _stream(
        self,
        ids: list[list[int]],
        stop: Stop | None,
        *,
        continuing: bool,
        echo: bool,
        logprobs_of: LogprobsOf | None,
        **options: Any,
    ) -> Iterator[TokenEvent]:
        """Yield the events of a run."""
        self._check_batch(ids)
        self._stops(stop, len(ids))
        speller = self.speller
        options |= {
            "echo": echo,
            "logprobs_of": named_ids(logprobs_of, len(ids), self.tokenizer),
            "max_seq_len": self.max_seq_len,
            "eos_token_id": self.eos_ids,
            "compat": self._compat(echo=echo),
            "schedule": self.schedule,
        }
        after = speller.text_after if continuing else lambda prompt: speller.text_of
        control = {} if stop is None else speller.control_tokens
        decoders = Decoders(speller.text_of, after, speller.is_byte, control)
        return stream_events(self.model, ids, decoders, stop, options)

    def text_infilling(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        suffix_first: bool = False,
        *,
        seeds: int | Sequence[int] | None = None,
        stop: Stop | None = None,
        top_logprobs: int = 0,
        logprobs_of: LogprobsOf | None = None,
        sampling_logprobs: bool = False,
    ) -> list[InfillingPrediction]:
        """Write the text between each prefix and its suffix, with a Code Llama model that was trained to infill.

        The rules are those of facebookresearch/codellama, ``llama/generation.py``, ``text_infilling``.

        Args:
            prefixes, suffixes: as many of the one as of the other, in order.
            max_gen_len: `max_seq_len - 1` if not given.
            suffix_first: whether the prompt names the suffix before the prefix.
            stop: see `text_completion`.
            others: see `generate`.

        Returns:
            Per pair `{"generation": text, "full_text": prefix + text + suffix}`, with `logprobs` also `"tokens"`, one
            vocabulary piece each (``▁he``), and `"logprobs"`, and the fields of `stop`, `top_logprobs`, `logprobs_of`
            and `sampling_logprobs` as from `text_completion`. A text ends at the tokenizer's end piece.

        Raises:
            ValueError, TypeError: as `generate`; the tokenizer has no infilling pieces; or the lists differ in length.

        >>> codellama.text_infilling(["def add(a, b):"], [" + b"], max_gen_len=32)  # doctest: +SKIP
        [{'generation': ' return a', 'full_text': 'def add(a, b): return a + b'}]
        """
        before, after = as_texts(prefixes), as_texts(suffixes)
        if len(before) != len(after):
            raise ReferenceAssertion(
                f"each prefix needs its suffix, got {len(before)} prefixes and {len(after)} suffixes: give as many"
            )
        prompts = [
            infilling_tokens(prefix, suffix, self.tokenizer, suffix_first=suffix_first)
            for prefix, suffix in zip(before, after, strict=True)
        ]
        stops = self._stops(stop, len(prompts))
        decoders: list[TextOf] = [functools.partial(continuing_text, tokenizer=self.tokenizer)] * len(prompts)
        answers = self.generate(
            prompt_tokens=prompts,
            max_gen_len=self._gen_len(max_gen_len),
            temperature=temperature,
            top_p=top_p,
            logprobs=logprobs,
            echo=False,
            stop_token=infilling_ids(self.tokenizer).end,
            **_given(seeds=seeds, stopping_criteria=_criteria(stops, prompts, decoders)),
            **_asked_beside(logprobs_of, sampling_logprobs=sampling_logprobs, top_logprobs=top_logprobs),
        )
        predictions: list[InfillingPrediction] = []
        for row, (answer, scores) in enumerate(_rows_with_scores(*answers)):
            text, details = self._answer(row, answer, scores, 0, stops, decoders[row])
            if scores:
                details["tokens"] = token_pieces(answer[: len(details["tokens"])], self.tokenizer)
            full = before[row] + text + after[row]
            predictions.append({"generation": text, "full_text": full, **details})  # type: ignore[typeddict-item]
        return predictions

    @functools.cached_property
    def speller(self) -> TokenSpeller:
        """The texts and bytes of this tokenizer's tokens, looked up once each."""
        return TokenSpeller(self.tokenizer)

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a text: the tokenizer's EOS; with a transformers tokenizer also those of the checkpoint."""
        ids = {self.tokenizer.eos_id} - {-1}
        if isinstance(self.tokenizer, TransformersTokenizer):
            ids |= set(eos_ids_of(self.model, {}))
        return sorted(ids)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer came with a chat format of its own."""
        return isinstance(self.tokenizer, TransformersTokenizer) and self.tokenizer.has_chat_template

    def encode_dialog(self, dialog: Dialog, chat_format: ChatFormat = "auto") -> list[int]:
        """The prompt of one dialog, for `generate`.

        Args:
            dialog: an optional system message, then user and assistant in turn, the last from the user.
            chat_format: `"llama2"`, the `"template"` that a transformers tokenizer came with, or `"auto"`: the template
                where there is one, else LLAMA2's.

        Raises:
            ValueError: a template is asked for and there is none, the template refuses the dialog, or the dialog breaks
                a rule of LLAMA2's format.

        >>> llama.encode_dialog([{"role": "user", "content": "Hi"}], "llama2")
        [1, 965, 94, 370, 811, 96, 329, 974, 965, 94, 50, 370, 811, 96]
        """
        return self._encode_dialog(dialog, template=self._uses_template(chat_format))

    def text_of(self, tokens: Sequence[int]) -> str:
        """Decoded tokens. Ids that a model embeds beyond its tokenizer's (padded vocabularies) stand for no text."""
        try:
            known = [token for token in tokens if token < self.tokenizer.n_words]
        except TypeError:
            raise TypeError(f"text_of takes a list of token ids, got {tokens!r}: wrap a single one as [id]") from None
        return self.tokenizer.decode(known)

    def _uses_template(self, chat_format: ChatFormat | None) -> bool:
        """Whether dialogs are written by the tokenizer's own chat template, and not in LLAMA2's format."""
        if chat_format is None:
            self._warn_of_template()
            return False
        check_choice("chat_format", chat_format, ("auto", "llama2", "template"))
        if chat_format == "template" and not self.has_chat_template:
            raise ValueError('this tokenizer has no chat template: take chat_format="llama2"')
        return chat_format != "llama2" and self.has_chat_template

    def _warn_of_template(self) -> None:
        """Warn that LLAMA2's format is the default if the tokenizer came with another."""
        if not self.has_chat_template:
            return
        assert isinstance(self.tokenizer, TransformersTokenizer)
        if not self.tokenizer.has_llama2_template:
            warnings.warn(
                "chat_completion writes LLAMA2's [INST] format, and this tokenizer came with another: give "
                'chat_format="template" for its own, or chat_format="llama2" to keep LLAMA2\'s without this warning',
                stacklevel=4,
            )

    def _encode(self, text: str, row: int) -> list[int]:
        """Encode a text as a prompt."""
        bos = self.tokenizer.bos_id >= 0
        ids = self.tokenizer.encode(text, bos=bos, eos=False)
        if not ids:
            raise ValueError(
                f"a prompt must hold at least one token, but prompt {row} is empty and this tokenizer has no BOS to "
                "start from: give a text"
            )
        return ids

    def _encode_dialog(self, dialog: Dialog, *, template: bool, row: int | None = None) -> list[int]:
        if not template:
            return dialog_tokens(with_plain_contents(dialog), self.tokenizer, row=row)
        check_template_messages(dialog, "the dialog" if row is None else f"dialog {row}")
        assert isinstance(self.tokenizer, TransformersTokenizer)
        return self.tokenizer.encode_chat(dialog)

    @overload
    def _stops(self, stop: Stop, rows: int) -> StopStrings: ...
    @overload
    def _stops(self, stop: Stop | None, rows: int) -> StopStrings | None: ...
    def _stops(self, stop: Stop | None, rows: int) -> StopStrings | None:
        """Read the stop strings of a call."""
        return None if stop is None else StopStrings(stop, rows, self.speller.control_tokens)

    def _ends(self, stop_token: int | None) -> list[int]:
        """Return the ids that end a row: EOS, or the one that is given in its place."""
        if stop_token is None:
            return self.eos_ids
        return [check_int("stop_token", stop_token, least=0, most=vocab_size_of(self.model) - 1)]

    def _check_batch(self, prompts: Any) -> None:
        """Check the two conditions on a batch that the reference asserts."""
        if not hasattr(prompts, "__len__") or isinstance(prompts, str | Mapping):  # refused by the engine
            return
        if self.max_batch_size is not None and len(prompts) > self.max_batch_size:
            raise ReferenceAssertion(
                f"a batch must not exceed max_batch_size={self.max_batch_size}, got {len(prompts)} prompts: "
                "split it, or raise max_batch_size"
            )
        for row, prompt in enumerate(prompts):
            if hasattr(prompt, "__len__") and len(prompt) > self.max_seq_len:
                raise ReferenceAssertion(
                    f"a prompt must fit max_seq_len of {self.max_seq_len} tokens, but row {row} has {len(prompt)}: "
                    "shorten or split it, or raise max_seq_len"
                )

    def _compat(self, *, echo: bool) -> Compat:
        """Choose `compat`: never cut an echoed prompt at an EOS, as the reference does, if the BOS is an EOS too."""
        return "fixed" if echo and self.tokenizer.bos_id in self.eos_ids else self.compat

    def _params(self, model: PreTrainedModel) -> SimpleNamespace:
        """Build the reference's `model.params`; None for fields that the model's config lacks."""
        config = model.config.get_text_config()
        return SimpleNamespace(
            dim=getattr(config, "hidden_size", None),
            n_layers=getattr(config, "num_hidden_layers", None),
            n_heads=getattr(config, "num_attention_heads", None),
            n_kv_heads=getattr(config, "num_key_value_heads", None),
            vocab_size=vocab_size_of(model),
            norm_eps=getattr(config, "rms_norm_eps", None),
            max_batch_size=self.max_batch_size,
            max_seq_len=self.max_seq_len,
        )

    def _gen_len(self, max_gen_len: int | None) -> int:
        return self.max_seq_len - 1 if max_gen_len is None else max_gen_len

    def _decoders(self, prompts: list[list[int]], *, continuing: bool) -> list[TextOf]:
        """Return each row's decoder of its completion."""
        if not continuing:
            return [self.text_of] * len(prompts)
        return [self.speller.text_after(prompt) for prompt in prompts]

    def _answer(
        self,
        row: int,
        tokens: list[int],
        scores: dict[str, list[Any]],
        given: int,
        stops: StopStrings | None,
        text_of: TextOf,
    ) -> tuple[str, dict[str, Any]]:
        """Return a row's text, and the prediction's other fields; the first `given` tokens are an echoed prompt."""
        text = self.text_of(tokens) if given else text_of(tokens)
        details: dict[str, Any] = {}
        reason: Any = scores.pop("finish_reason", None)
        if stops is not None:
            cut = stops.cut(row, tokens[given:], text_of)
            text = text[: len(text) - cut.dropped]
            tokens = tokens[: given + cut.tokens]
            details["stop_reason"] = cut.reason
            reason = "stop" if reason is not None and cut.reason is not None else reason
        if scores or reason is not None:
            details["tokens"] = [self.text_of([token]) for token in tokens]
        if reason is not None:
            spelled = [list(self.speller.bytes_of(token)) for token in tokens]
            details |= {"ids": tokens, "bytes": spelled, "finish_reason": reason}
        if scores:
            details |= {name: values[: len(tokens)] for name, values in scores.items()}
        return text, details


def _criteria(stops: StopStrings | None, prompts: list[list[int]], decoders: list[TextOf]) -> list[Any] | None:
    """Make the stopping criteria of a call with stop strings."""
    return [stops.criterion(prompts, decoders)] if stops else None


def _check_model(model: Any) -> None:
    refuse_wrapper(model)
    if isinstance(model, torch.nn.Module) and hasattr(model, "config"):
        refuse_encoder_decoder(model)
        return
    found = repr(model) if isinstance(model, str | Path) else type(model).__name__
    raise TypeError(
        f"Llama takes a model of transformers, got {found}: load one, or give its folder to Llama.build(ckpt_dir, "
        "tokenizer_path, max_seq_len, max_batch_size)"
    )


def _check_limits(max_seq_len: Any, max_batch_size: Any, compat: Any, schedule: Any) -> None:
    """Check the arguments of `Llama` that do not need the model."""
    check_choice("compat", compat, ("fixed", "meta"))
    check_choice("schedule", schedule, ("auto", "reference", "padded"))
    if max_seq_len is not None:
        check_int("max_seq_len", max_seq_len, least=1)
    if max_batch_size is not None:
        check_int("max_batch_size", max_batch_size, least=1)


def _keeps_cache(keep_cache: bool | None, schedule: Schedule) -> bool:
    """Whether calls keep their cache. By default not under the reference schedule, which is bit for bit."""
    if keep_cache is None:
        return schedule != "reference"
    return check_bool("keep_cache", keep_cache, "leave it out to keep it unless the schedule is the reference's")


def _check_sizes(tokenizer: TokenizerLike, embedded: int) -> None:
    """Refuse a tokenizer with more tokens than the model embeds; the model may lack tokens added to the tokenizer."""
    if hasattr(tokenizer, "n_added") and min(vocab_sizes(tokenizer)) > embedded:
        raise ValueError(
            f"the model must embed every token, but the tokenizer has {tokenizer.n_words} and the model {embedded}: "
            "take the tokenizer that came with the model"
        )


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def _flags(logprobs: bool, echo: bool, sampling_logprobs: bool) -> dict[str, bool]:
    """Check the flags of a call."""
    return {
        "logprobs": check_bool("logprobs", logprobs, _FLAG_WAY_OUT),
        "echo": check_bool("echo", echo, "with True the answers start with their prompts"),
        "sampling_logprobs": check_bool("sampling_logprobs", sampling_logprobs),
    }


def _score_fields(flags: dict[str, bool], *, top: bool, named: bool) -> list[str]:
    """List the fields of a prediction that have one item per token."""
    sampling = flags["sampling_logprobs"]
    fields = ["logprobs"] * (flags["logprobs"] or sampling) + [*SAMPLING_LOGPROBS] * sampling
    return fields + ["top_logprobs"] * top + ["logprobs_of"] * named


def _chat_prediction(text: str, details: dict[str, Any], *, unsafe: bool) -> ChatPrediction:
    message: Message = {"role": "assistant", "content": UNSAFE_ERROR if unsafe else text}
    return {"generation": message, **details}  # type: ignore[typeddict-item]


def _nothing_generated(fields: list[str], stop: Stop | None, *, details: bool) -> dict[str, Any]:
    """Make the fields of a prediction for which nothing was generated."""
    lists = ["tokens"] * bool(fields or details) + ["ids", "bytes"] * details + fields
    ends = ["finish_reason"] * details + ["stop_reason"] * (stop is not None)
    nothing: dict[str, Any] = {name: [] for name in lists}
    return nothing | dict.fromkeys(ends)


def _asked_beside(logprobs_of: LogprobsOf | None, *, top_logprobs: int = 0, **flags: bool) -> dict[str, Any]:
    """Collect the keywords of `generate` that ask for more than tokens and logprobs, if they are in use."""
    asked: dict[str, Any] = {name: value for name, value in flags.items() if value is not False}
    if top_logprobs is False or top_logprobs != 0:
        asked["top_logprobs"] = top_logprobs
    return asked | _given(logprobs_of=logprobs_of)


def _rows_with_scores(
    tokens: list[list[int]], logprobs: list[list[float]] | None, more: dict[str, list[list[Any]]] | None = None
) -> list[tuple[list[int], dict[str, list[Any]]]]:
    """Pair each row of an answer of `generate` with its scores, by the names of a prediction's fields."""
    scores = ({} if logprobs is None else {"logprobs": logprobs}) | (more or {})
    return [(row, {name: values[place] for name, values in scores.items()}) for place, row in enumerate(tokens)]
