"""`model.generate()` and `score_tokens()` with LLAMA2's semantics, on transformers' public API.

Only continuous batching needs more than the public API (see `request_manager`). What this module does not do: it runs
no loop of its own (see `loop`), and it takes text only for stop strings, stream events and token texts.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from ..checks import PerRow, check_int
from ..text.stopping import Stop
from ..text.tokens import TokenSpeller
from .adapters import is_peft_model, refuse_lost_soft_prompts, through_peft, with_inner
from .continuations import LlamaContinuationOutput, continuations_scored
from .continuous import LlamaContinuousMixin
from .events import Decoders, EventSource, TokenEvent
from .inference import in_inference_mode, may_be_compiled
from .inputs import beside_tokens, check_named_ids, columns_of, read_beside_tokens, read_prompts
from .loop import stream_prompts
from .model_info import (
    eos_ids_of,
    named_pad_id,
    refuse_encoder_decoder,
    refuse_unscored,
    refuse_unusable,
    refuse_wrapper,
    scored_size_of,
    vocab_size_of,
)
from .model_state import drops_cache
from .options import Call, refuse_caches, resolve_alias, sort_keywords
from .outputs import LlamaGenerateOutput, LlamaScoreOutput, generate_output, sequences_of, widened
from .plan import Plan, Request, make_plan
from .probe import Probe
from .prompt_cache import PromptCache, check_prompt_cache
from .releases import check_release
from .rows import Rows, run_parts, unshifted_rows
from .schedule import Schedule
from .scoring import CHUNK_BYTES, refuse_other_positions, refuse_without_order
from .streamers import ended_with_the_call
from .streaming import stream_events
from .trimming import Compat
from .turns import in_turn
from .view import Observer, loop_view, twin_of
from .walk import CACHE_BYTES
from .windows import tokens_scored

check_release()


class LlamaGenerationMixin(LlamaContinuousMixin, GenerationMixin):
    """transformers' `GenerationMixin` with LLAMA2's `generate`. Put it before the model class.

    What it promises:

    - Sampling settings come from the call, else Meta's defaults; a checkpoint contributes special tokens only.
    - Ragged prompts need no pad token: padding is a mask or a length, never inferred from token ids.
    - On Meta's stream, `torch.manual_seed(s)` before the call gives the reference's tokens.
    - With `seeds`, a row's completion does not depend on its batch, the schedule or the chunking.
    - No option is ignored: what has no place in this sampler is refused by name.
    """

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | Sequence[Sequence[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        max_gen_len: int | Sequence[int] | None = None,
        temperature: PerRow | None = None,
        top_p: PerRow | None = None,
        echo: bool = False,
        logprobs: bool = False,
        top_logprobs: int = 0,
        logprobs_of: Sequence[int] | Sequence[Sequence[int]] | None = None,
        sampling_logprobs: bool = False,
        seeds: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        max_seq_len: int | None = None,
        schedule: Schedule = "auto",
        compat: Compat = "fixed",
        chunk_bytes: int = CHUNK_BYTES,
        share_prefix: bool | None = None,
        prompt_cache: PromptCache | None = None,
        **kwargs: Any,
    ) -> "LlamaGenerateOutput | Tensor":
        r"""Complete a batch of prompts as LLAMA2 does (facebookresearch/llama, ``llama/generation.py``).

        Args:
            inputs (lists of token ids, or a `torch.LongTensor` of shape (B, T)): a tensor goes with an
                `attention_mask` where it is padded, on either side. `input_ids` means the same.
            max_gen_len (`int` or one per row): most new tokens per row; `max_new_tokens` means the same.
            temperature (`float` or one per row, defaults to 0.6): 0 is greedy; `do_sample=False` means 0.
            top_p (`float` or one per row, defaults to 0.9): the nucleus; unused where the temperature is 0.
            echo (`bool`): whether `tokens` and `logprobs` start with the prompt.
            logprobs (`bool`): whether to return raw logprobs.
            top_logprobs (`int`): how many best tokens to report at each position.
            logprobs_of (list of ids, or one such list per prompt, *optional*): ids whose raw logprobs and ranks to
                report at each position. Rank 1 is the most probable token; of equals the lower id comes first.
            sampling_logprobs (`bool`): whether to return, beside `logprobs`, those of the same tokens after temperature
                over the whole vocabulary and after the nucleus, and the nucleus' mass.
            seeds (`int` or one per prompt, *optional*): one stream per prompt; an int means `seed, seed + 1, ...`.
                The copies that `num_return_sequences` makes of a prompt draw from distinct streams of its seed, the
                first of them as the prompt alone would.
            generator (`torch.Generator`, *optional*): Meta's stream from this generator, of the logits' device, instead
                of torch's global one.
            max_seq_len (`int`, *optional*): most tokens per row, prompt included; defaults to the model's context.
                `max_length` means the same.
            schedule (`"auto"`, `"reference"` or `"padded"`): reference is Meta's own: no padding, one column at a time
                from the shortest prompt's end, bit for bit. Padded prefills all prompts at once, left-padded: the same
                tokens up to the rounding of the logits, and a ragged batch is much faster. Auto takes padded for a
                ragged batch if it fits the context that way, else reference. In padded, the state left in the
                generator is the reference's unless a row runs into its limit and would have met an EOS beyond it.
            compat (`"fixed"` or `"meta"`): `"meta"` keeps the reference's quirks (see docs/coming-from-llama.md).
            chunk_bytes (`int`): memory for the logits of one chunk of prompt when logprobs are echoed, 128 MiB if not
                given. Each chunk reads all weights once more, so much less of it costs time.
            share_prefix (`bool`, *optional*): whether rows share the prefill of what they have in common: equal prompts
                (the copies of `num_return_sequences` among them), and what all prompts begin with. If not given, they
                do where that saves more than it costs, unless `schedule="reference"` was asked for by name, which is
                the reference bit for bit. The tokens are the same up to the rounding of the logits. Where a model's
                caches do not allow it, nothing is shared.
            prompt_cache ([`PromptCache`], *optional*): what earlier calls have read, for prompts that begin as those
                did, and for what this call reads: pass the same object in each turn of a conversation. The tokens are
                the same up to the rounding of the logits. With `echo` and `logprobs` prompts are read anew.
            kwargs: everything else that transformers' `generate` takes: `attention_mask`, `eos_token_id` (an id or a
                list), `logits_processor`, `stopping_criteria`, `stop_strings` with `tokenizer`, `streamer`,
                `num_return_sequences`, `repetition_penalty`, ...

        Returns:
            transformers' tensor for tensor inputs (B, T), whose completions begin in column T; a
            [`LlamaGenerateOutput`] for lists, or if `logprobs`, `top_logprobs`, `logprobs_of`, `sampling_logprobs`,
            `echo` or `return_dict_in_generate` was asked for.

        Raises:
            ValueError: a bad value (the rule, the value, the row and the way out are named), or logits with nan or inf.
            TypeError: an unknown keyword, or a value of the wrong type.

        >>> out = model.generate([[1, 306, 4658], [1, 450]], max_gen_len=16, logprobs=True, echo=True)
        >>> out.tokens, out.logprobs, out.finish_reason
        """
        with ended_with_the_call(kwargs):
            # 1. Read the call: its keywords by who reads them, its prompts as lists.
            call, prompts, given = _read_call(self, inputs, generation_config, kwargs)
            prompt_cache = check_prompt_cache(prompt_cache, call.to_model)

            # 2. Plan: check every value against the model, choose a schedule, lay out the rows.
            request = Request(
                max_gen_len=max_gen_len,
                max_seq_len=max_seq_len,
                temperature=temperature,
                top_p=top_p,
                seeds=seeds,
                generator=generator,
                echo=echo,
                logprobs=logprobs,
                top_logprobs=top_logprobs,
                logprobs_of=logprobs_of,
                sampling_logprobs=sampling_logprobs,
                schedule=schedule,
                compat=compat,
                chunk_bytes=chunk_bytes,
                share_prefix=share_prefix,
            )
            plan = _make_plan(self, prompts, call, request)

            # 3. Run: prefill and generate, and make rows out of columns.
            rows, extras = _run(self, plan, call, prompt_cache)

            # 4. Answer, in transformers' convention and, where more was asked for, in Meta's beside it.
            columns = columns_of(given)
            sequences = sequences_of(rows, plan, columns)
            more = plan.wants_scores or plan.echo or call.options.get("return_dict_in_generate")
            only_ids = isinstance(given, Tensor) and not more
            return sequences if only_ids else generate_output(rows, plan, sequences, widened(extras, plan, columns))

    @through_peft
    def stream(
        self,
        inputs: Tensor | Sequence[Sequence[int]] | None = None,
        *,
        tokenizer: Any = None,
        stop: Stop | None = None,
        **kwargs: Any,
    ) -> Iterator[TokenEvent]:
        r"""The tokens of `generate(inputs, **kwargs)` as they come, for a whole batch.

        Args:
            inputs: as for `generate`.
            tokenizer: decodes the events' texts; without one they are empty.
            stop: a string or several that end a row, or one list per row. The text ends right before the first; the
                tokens that come are those that lie wholly before it.
            kwargs: everything else that `generate` takes, but a `streamer`. With `logprobs`, `top_logprobs`,
                `logprobs_of`, `sampling_logprobs` and `echo` events say of each token what `generate`'s output says.

        Returns:
            an iterator of [`TokenEvent`]: `row`, `id`, `text`, and where asked for `logprob`, `top`, `logprobs_of`,
            `temperature_logprob`, `sampled_logprob` and `nucleus_mass`; and for each row at its end one with `id` None,
            the `finish_reason` and the `stop_reason`. A row's texts add up to what follows its prompt in the
            decoded whole, or with `echo` to the whole. The run goes on only while events are asked for; closing the
            iterator ends it.

        Raises:
            ValueError, TypeError: as `generate`, when the first event is asked for.

        >>> for event in model.stream([[1, 306]], tokenizer=tokenizer, max_gen_len=16, logprobs=True):
        ...     print(event.text, end="")
        """
        if kwargs.get("streamer") is not None:
            raise ValueError("stream gives the tokens by itself, so it takes no streamer: leave it out")
        stop = resolve_alias("stop", stop, "stop_strings", kwargs.pop("stop_strings", None))
        if tokenizer is None:
            if stop is not None:
                raise ValueError("stop strings are text, so stream needs the model's tokenizer: pass tokenizer=")
            decoders = Decoders(lambda ids: "", lambda prompt: lambda ids: "")
        else:
            speller = TokenSpeller(tokenizer)
            control = {} if stop is None else speller.control_tokens
            decoders = Decoders(speller.text_of, speller.text_after, speller.is_byte, control)
        kwargs.pop("return_dict_in_generate", None)
        return stream_events(self, inputs, decoders, stop, kwargs)

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Never load a checkpoint's own `generate`: this class has its own, and no code of a checkpoint is run.

        Raises:
            OSError: always; transformers takes it to mean that the checkpoint has none.
        """
        raise OSError("a class with LLAMA2's generate takes none from a checkpoint")

    @through_peft
    @torch.no_grad()
    def score_tokens(
        self,
        prompts: Tensor | Sequence[Sequence[int]],
        *,
        attention_mask: Tensor | None = None,
        top_logprobs: int = 0,
        logprobs_of: Sequence[int] | Sequence[Sequence[int]] | None = None,
        start: int | Sequence[int] | None = None,
        max_seq_len: int | None = None,
        stride: int | None = None,
        bos: int | bool | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        cache_bytes: int = CACHE_BYTES,
    ) -> LlamaScoreOutput:
        r"""Raw logprobs of given texts; nothing is generated, and rows do not see each other.

        The list may be long: it is forwarded in batches, and whatever several of its texts begin with is read once.

        Args:
            prompts (lists of token ids, or a `torch.LongTensor` of shape (B, T)): each of at most `max_seq_len` tokens,
                or longer with `stride`.
            attention_mask (`torch.Tensor` of shape (B, T), *optional*): of a padded tensor, on either side.
            top_logprobs (`int`): how many best tokens to report at each position.
            logprobs_of (list of ids, or one such list per row, *optional*): ids whose logprobs and ranks to report at
                each position, as for `generate`.
            start (`int` or one per row, defaults to 0): the first position that is asked for. The answer begins with
                it; no logits are computed for those before it.
            max_seq_len (`int`, *optional*): most tokens of a text, as for `generate`; the model's context if not given.
            stride (`int`, *optional*): longer texts are scored in windows of `max_seq_len` tokens, each `stride` tokens
                after the one before. Each token is scored once, in the first window that reaches it, and so with at
                least `max_seq_len - stride` tokens before it. Below `max_seq_len`; the smaller, the slower.
            bos (`int` or `True`, *optional*): a token to put before each text, so that its first token is scored too:
                an id, or `True` for the checkpoint's own. It takes one place of the first window, and none of the
                answer.
            chunk_bytes (`int`): memory for the logits of one forward, 128 MiB if not given.
            cache_bytes (`int`): memory for the caches of shared beginnings, 1 GiB if not given. A beginning whose cache
                does not fit is read again for each text; a single text's own cache is always allowed.

        Returns:
            [`LlamaScoreOutput`]: `logprobs`, natural logarithm; without `bos` nothing stands before a row's first
            token, and its place holds 0.0. `totals` and `counts` leave it out, so a perplexity is
            `exp(-sum(totals) / sum(counts))`.

        Raises:
            ValueError: a bad prompt (the row is named), a value out of range, or logits with nan or inf.

        >>> model.score_tokens([[1, 306, 4658], [1, 450]]).logprobs
        """
        refuse_unusable(self)
        top = check_int("top_logprobs", top_logprobs, least=0, most=scored_size_of(self))
        chunk_bytes = check_int("chunk_bytes", chunk_bytes, least=1)
        cache_bytes = check_int("cache_bytes", cache_bytes, least=0)
        rows = _read_prompts(self, prompts, attention_mask, {})
        refuse_unscored(self, rows, "logprobs", "put it into a context of score_continuations")
        named = check_named_ids(logprobs_of, len(rows), scored_size_of(self))
        return tokens_scored(
            self,
            _transformers_generate(self),
            rows,
            top=top,
            named=named,
            start=start,
            max_seq_len=max_seq_len,
            stride=stride,
            bos=bos,
            chunk_bytes=chunk_bytes,
            cache_bytes=cache_bytes,
        )

    @through_peft
    def score_continuations(
        self,
        contexts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[Sequence[int]]],
        *,
        bos: int | bool | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        cache_bytes: int = CACHE_BYTES,
    ) -> LlamaContinuationOutput:
        r"""Raw logprobs of given continuations of given contexts, as multiple-choice evaluations need them.

        Whatever several contexts begin with is read once, and so is each context. No answer depends on the order or on
        what else is in the lists.

        Args:
            contexts (N lists of token ids): the texts before.
            continuations (for each context a list of lists of token ids): as many for each as you like.
            bos (`int` or `True`, *optional*): the token that an empty context stands for: an id, or `True` for the
                checkpoint's own. Without it empty contexts are refused. It is not put before other contexts.
            chunk_bytes (`int`): memory for the logits of one forward, 128 MiB if not given.
            cache_bytes (`int`): memory for the caches of shared beginnings, 1 GiB if not given. A beginning whose cache
                does not fit is read again for each text; a single text's own cache is always allowed.

        Returns:
            [`LlamaContinuationOutput`]: `totals[i][j]`, `logprobs[i][j]` (one per token of the continuation) and
            `is_greedy[i][j]`.

        Raises:
            ValueError: an empty context without `bos`, an empty continuation, an id outside the vocabulary, a text
                beyond the model's context (row and continuation are named), or logits with nan or inf.
            TypeError: text instead of ids, or lists that are nested otherwise.

        >>> model.score_continuations([[1, 306, 4658]], [[[825], [393, 278]]]).totals
        """
        refuse_unusable(self)
        loop = _transformers_generate(self)
        probe = Probe(self, loop)
        refuse_other_positions(self, probe)
        refuse_without_order(self, probe)
        return continuations_scored(
            self, loop, contexts, continuations, bos=bos, chunk_bytes=chunk_bytes, cache_bytes=cache_bytes
        )


_OWN_ARGUMENTS = [name for name in inspect.signature(LlamaGenerationMixin.generate).parameters if name != "self"]


class LlamaForCausalLM(LlamaGenerationMixin, transformers.LlamaForCausalLM):
    """transformers' `LlamaForCausalLM` with LLAMA2's `generate`; loads the same checkpoints."""


def _read_call(
    model: Any, inputs: Any, config: GenerationConfig | None, kwargs: dict[str, Any]
) -> tuple[Call, list[list[int]], Any]:
    """Sort the keywords of `generate`, and read the prompts as lists; return these beside the prompts as given."""
    refuse_unusable(model)
    events = kwargs.pop("streamer") if isinstance(kwargs.get("streamer"), EventSource) else None
    call = sort_keywords(model, config, kwargs, _OWN_ARGUMENTS)
    call.events = events
    inputs = resolve_alias("inputs", inputs, "input_ids", call.to_model.pop("input_ids", None))
    mask = call.to_model.pop("attention_mask", None)
    prompts = _read_prompts(model, inputs, mask, call.options)
    if drops_cache(model):
        refuse_caches(call, "a model that trains with gradient checkpointing, which drops it")
        call.options["use_cache"] = False
    for name in beside_tokens(call.to_model):
        call.to_model[name] = read_beside_tokens(name, call.to_model[name], mask, prompts)
    return call, prompts, inputs


def _make_plan(model: Any, prompts: list[list[int]], call: Call, request: Request) -> Plan:
    """Make the plan of a call; refuse what the model's forward cannot do, according to the probe."""
    probe = Probe(model, _transformers_generate(model))
    refuse_other_positions(model, probe)
    plan = make_plan(model, prompts, call, request, probe)
    if call.events is not None:
        call.events.take_plan(plan)
    if plan.echo and plan.wants_scores:
        refuse_without_order(model, probe)
        refuse_unscored(model, prompts, "echoed logprobs", "ask for logprobs without echo")
    if plan.forced() is not None:
        refuse_unscored(model, prompts, "ragged batches in the reference schedule", 'take schedule="padded"')
    return plan


def _run(model: Any, plan: Plan, call: Call, prompt_cache: PromptCache | None) -> tuple[Rows, dict[str, Any]]:
    """Run a plan; return its rows, and the further outputs of transformers' loop."""
    loop = _transformers_generate(model)
    if not plan.scores_unshifted:
        return run_parts(model, loop, plan, call, prompt_cache)
    rows = unshifted_rows(model, loop, plan, call.to_model)
    stream_prompts(plan.shown, call)
    return rows, {}


def _read_prompts(model: Any, inputs: Any, attention_mask: Any, options: dict[str, Any]) -> list[list[int]]:
    """Prompts as lists of ids; what looks padded is told by the pad id that the call or the checkpoint names."""
    pad_id = named_pad_id(model, options)
    eos_ids = () if pad_id is None else eos_ids_of(model, options)
    return read_prompts(inputs, attention_mask, vocab_size_of(model), pad_id=pad_id, eos_ids=eos_ids)


def _transformers_generate(model: Any) -> Callable[..., Any]:
    """transformers' own `generate`, on a view of the model, between which and the loop an `observer` may stand."""

    refuse_lost_soft_prompts(model)

    def generate(*args: Any, observer: Observer | None = None, **kwargs: Any) -> Any:
        if drops_cache(model):
            kwargs["generation_config"].use_cache = False  # each step reads the whole text
        if not may_be_compiled(kwargs):
            observer = in_turn(model, in_inference_mode(model, observer))
        view = loop_view(model, observer)
        return super(LlamaGenerationMixin, view).generate(*args, **kwargs)

    return generate


def with_llama_generation(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with `LlamaGenerationMixin`: a new object of a new class that shares all weights with `model`.

    A model of PEFT becomes one around such a twin: PEFT's own methods, and those of this package under its adapters.

    Args:
        model: any decoder-only causal language model of transformers, compiled by `torch.compile` or not, or a model of
            PEFT around one. It is left as it is.

    Raises:
        ValueError: the model is an encoder-decoder.
        TypeError: it is no model of transformers, or one in a wrapper such as `DistributedDataParallel`.

    >>> model = with_llama_generation(AutoModelForCausalLM.from_pretrained(name))
    """
    if isinstance(model, LlamaGenerationMixin):
        return model
    if type(model).__name__ == "OptimizedModule":
        return _compiled_twin(model)
    refuse_wrapper(model)
    if isinstance(model, torch.nn.Module) and hasattr(model, "config"):
        refuse_encoder_decoder(model)
    if not (isinstance(model, torch.nn.Module) and hasattr(model, "config") and hasattr(model, "generation_config")):
        raise TypeError(
            f"with_llama_generation takes a causal language model of transformers, got {type(model).__name__}: load "
            "one with AutoModelForCausalLM.from_pretrained"
        )
    if is_peft_model(model):
        peft_model: Any = model
        ours = isinstance(peft_model.get_base_model(), LlamaGenerationMixin)
        return model if ours else with_inner(model, with_llama_generation)
    twin = twin_of(model)
    model_class: Any = type(model)
    twin.__class__ = _with_mixin(model_class)
    return twin


def _compiled_twin(compiled: Any) -> Any:
    """A twin of the model under `torch.compile(model)` whose forward is the compiled one.

    The loop reads the signature of the forward and the model's own methods, which the compiled module hides.
    """
    original = compiled._orig_mod
    twin = twin_of(with_llama_generation(original))
    for name, hooks in vars(original).items():
        if name.startswith("_forward") and "hooks" in name:
            setattr(twin, name, type(hooks)())  # the compiled call runs the original's

    @functools.wraps(original.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs)

    twin.forward = forward
    return twin


@functools.cache
def _with_mixin(model_class: Any) -> Any:
    """The class with the mixin before it, under the same name: `save_pretrained` writes that into the config."""
    # Pickling looks a class up by its name, so the twin is rebuilt from the class that it was made of.
    members = {"__module__": __name__, "__reduce__": lambda self: (_blank_twin, (model_class,), self.__dict__)}
    return type(model_class.__name__, (LlamaGenerationMixin, model_class), members)


def _blank_twin(model_class: Any) -> Any:
    twin_class = _with_mixin(model_class)
    return twin_class.__new__(twin_class)
