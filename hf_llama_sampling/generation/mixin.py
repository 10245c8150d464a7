"""`model.generate()` with LLAMA2's semantics, on transformers' public API alone.

transformers runs the loop: caches, attention masks, streamers, other processors, quantization and offload are its
business. One logits processor draws the token itself and answers with a one-hot row under greedy decoding; one stopping
criterion says which rows are done. What this module does not do: it never sees text.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from ..checks import PerRow, both_streams, check_choice, check_int, check_seeds, first_not_none
from . import options as arguments
from .loop import (
    Rows,
    Run,
    Scored,
    Step,
    Stop,
    TopLogprobs,
    collect,
    criteria,
    in_one_tensor,
    score_prompts,
)
from .options import Schedule, context_of, refuse_encoder_decoder, repeat_interleave, repeat_setting, vocab_size_of
from .scoring import CHUNK_BYTES, TokenScores, score_columns
from .trimming import Compat, FinishReason, answer_span, finish_reason

_TO_THE_LOOP = ("prefix_allowed_tokens_fn", "synced_gpus", "streamer")
_EXTRAS = ("logits", "attentions", "hidden_states", "past_key_values")


@dataclass
class LlamaGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns for prompts given as lists, and whenever more than token ids was asked for.

    Args:
        sequences (`torch.LongTensor` of shape (B, T)): transformers' convention: left-padded prompt, completion with
            its EOS, then pad.
        tokens (`list[list[int]]`): Meta's convention: the completion (with `echo` after its prompt), cut before EOS.
        logprobs (`list[list[float]]`, *optional*): of the same tokens under the raw float32 logits, natural logarithm;
            0.0 for a row's first token. With processors that edit logits, completions' are those of the edited logits.
        sampled_logprobs (`list[list[float]]`, *optional*): under the distribution the token was drawn from, after
            temperature and nucleus; 0.0 where nothing was drawn (prompt tokens, greedy rows).
        top_logprobs (`list[list[list[tuple[int, float]]]]`, *optional*): per position the k best ids with their raw
            logprobs, best first; empty for a row's first token.
        finish_reason (`list[str]`): per row `"stop"` (an EOS or a stopping criterion) or `"length"`.
        settings (`dict`): what was in force.
    """

    tokens: list[list[int]] | None = None
    logprobs: list[list[float]] | None = None
    sampled_logprobs: list[list[float]] | None = None
    top_logprobs: list[list[TopLogprobs]] | None = None
    finish_reason: list[FinishReason] | None = None
    settings: dict[str, Any] | None = None


@dataclass
class LlamaScoreOutput(ModelOutput):
    """What `score_tokens` returns; the lists are as long as the prompts.

    Args:
        logprobs (`list[list[float]]`): raw logprob of each token given those before it; 0.0 for the first.
        top_logprobs (`list[list[list[tuple[int, float]]]]`, *optional*): per position the k best ids with their raw
            logprobs, best first; empty for the first.
    """

    logprobs: list[list[float]] | None = None
    top_logprobs: list[list[TopLogprobs]] | None = None


class LlamaGenerationMixin(GenerationMixin):
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
        seeds: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        max_seq_len: int | None = None,
        schedule: Schedule = "auto",
        compat: Compat = "fixed",
        chunk_bytes: int = CHUNK_BYTES,
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
            compat (`"fixed"` or `"meta"`): `"meta"` keeps the reference's quirks; see the README's table.
            chunk_bytes (`int`): memory for the logits of one chunk of prompt when logprobs are echoed, 128 MiB if not
                given. Each chunk reads all weights once more, so much less of it costs time.
            kwargs: everything else that transformers' `generate` takes: `attention_mask`, `eos_token_id` (an id or a
                list), `logits_processor`, `stopping_criteria`, `stop_strings` with `tokenizer`, `streamer`,
                `num_return_sequences`, `repetition_penalty`, ...

        Returns:
            transformers' tensor (B, T) for tensor inputs; a [`LlamaGenerateOutput`] for lists, or if `logprobs`,
            `top_logprobs`, `echo` or `return_dict_in_generate` was asked for.

        Raises:
            ValueError: a bad value (the rule, the value, the row and the way out are named), or logits with nan or inf.
            TypeError: an unknown keyword, or a value of the wrong type.

        >>> out = model.generate([[1, 306, 4658], [1, 450]], max_gen_len=16, logprobs=True, echo=True)
        >>> out.tokens, out.logprobs, out.finish_reason
        """
        refuse_encoder_decoder(self)
        call = arguments.sort_keywords(self, generation_config, kwargs, _OWN_ARGUMENTS)
        inputs = arguments.resolve_alias("inputs", inputs, "input_ids", call.to_model.pop("input_ids", None))
        was_tensor, prompts = arguments.take_prompts(
            inputs, call.to_model.pop("attention_mask", None), vocab_size_of(self)
        )
        run, settings = self._plan(
            prompts,
            call,
            max_gen_len=max_gen_len,
            max_seq_len=max_seq_len,
            temperature=temperature,
            top_p=top_p,
            top=check_int("top_logprobs", top_logprobs, least=0, most=vocab_size_of(self)),
            logprobs=logprobs,
            seeds=seeds,
            generator=generator,
            schedule=schedule,
        )
        check_choice("compat", compat, ("fixed", "meta"))
        chunk_bytes = check_int("chunk_bytes", chunk_bytes, least=1)
        unshifted = compat == "meta" and run.shortest == run.total_len
        done, extras = self._run(run, call, echo=echo, unshifted=unshifted, chunk_bytes=chunk_bytes)

        sequences = in_one_tensor(done.tokens, run.lengths, run.pad_id).to(run.device)
        if was_tensor and not (run.wants_scores or echo or call.options.get("return_dict_in_generate")):
            return sequences
        rows = list(zip(done.tokens, run.lengths, strict=True))
        spans = [answer_span(text, n, echo=echo, eos_ids=run.eos_ids, compat=compat) for text, n in rows]

        def answers(lists: list[list[Any]]) -> list[list[Any]]:
            return [items[span] for items, span in zip(lists, spans, strict=True)]

        return LlamaGenerateOutput(
            sequences=sequences,
            tokens=answers(done.tokens),
            logprobs=answers(done.logprobs) if logprobs else None,
            sampled_logprobs=answers(done.sampled_logprobs) if logprobs else None,
            top_logprobs=answers(done.top_logprobs) if run.top else None,
            finish_reason=[
                finish_reason(text[n:], run.eos_ids, stopped=stopped)
                for (text, n), stopped in zip(rows, done.stopped, strict=True)
            ],
            settings=settings | {"compat": compat, "echo": echo},
            **extras,
        )

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Never load a checkpoint's own `generate`: this class has its own, and no code of a checkpoint is run.

        Raises:
            OSError: always; transformers takes it to mean that the checkpoint has none.
        """
        raise OSError("a class with LLAMA2's generate takes none from a checkpoint")

    def _plan(
        self,
        prompts: list[list[int]],
        call: arguments.Call,
        *,
        max_gen_len: Any,
        max_seq_len: Any,
        temperature: PerRow | None,
        top_p: PerRow | None,
        top: int,
        logprobs: bool,
        seeds: int | Sequence[int] | None,
        generator: torch.Generator | None,
        schedule: Schedule,
    ) -> tuple[Run, dict[str, Any]]:
        """What the loop has to do, once all that the call says is checked, and the settings to report."""
        options = call.options
        check_choice("schedule", schedule, ("auto", "reference", "padded"))
        if seeds is not None and generator is not None:
            raise ValueError(both_streams())
        device = arguments.device_of(self)
        arguments.check_generator(generator, device)
        copies = check_int("num_return_sequences", options.get("num_return_sequences") or 1, least=1)
        rows = len(prompts) * copies

        total = arguments.resolve_alias("max_seq_len", max_seq_len, "max_length", options.get("max_length"))
        max_seq_len = context_of(self) if total is None else check_int("max_seq_len", total, least=1)
        arguments.check_lengths(prompts, max_seq_len)
        wanted = arguments.resolve_alias("max_gen_len", max_gen_len, "max_new_tokens", options.get("max_new_tokens"))
        gen_lens = arguments.gen_lens(wanted, max_seq_len, total is not None, prompts)
        limits = [
            wish if max_seq_len is None else min(wish, max_seq_len - len(prompt))
            for wish, prompt in zip(gen_lens, prompts, strict=True)
        ]
        editing = arguments.options_that_edit(options)
        timed = ["max_time"] if options.get("max_time") is not None else []
        chosen = arguments.choose_schedule(
            schedule, [len(prompt) for prompt in prompts], limits, context_of(self), [*editing, *timed]
        )
        eos_ids = arguments.eos_ids_of(self, options)
        pad_id = first_not_none(options.get("pad_token_id"), self.generation_config.pad_token_id, *eos_ids, 0)
        run = Run(
            prompts=repeat_interleave(prompts, copies),
            limits=repeat_interleave(limits, copies),
            padded=chosen == "padded",
            temperature=repeat_setting("temperature", arguments.choose_temperature(temperature, options), copies, rows),
            top_p=repeat_setting("top_p", arguments.choose_top_p(top_p, options), copies, rows),
            eos_ids=eos_ids,
            pad_id=pad_id,
            # Old checkpoints name a pad token that cannot be embedded, such as -1.
            filler=pad_id if 0 <= pad_id < vocab_size_of(self) else first_not_none(*eos_ids, 0),
            wants_scores=bool(logprobs or top),
            top=top,
            edited=bool(
                editing or call.to_loop.get("logits_processor") or call.to_loop.get("prefix_allowed_tokens_fn")
            ),
            device=device,
            generator=generator,
            seeds=None if seeds is None else repeat_interleave(check_seeds(seeds, len(prompts)), copies),
            copies=list(range(copies)) * len(prompts),
            agree=_agreement(self),
        )
        settings = {
            "temperature": run.temperature,
            "top_p": run.top_p,
            "max_gen_len": gen_lens[0] if len(set(gen_lens)) == 1 else repeat_interleave(gen_lens, copies),
            "max_seq_len": max_seq_len,
            "seeds": run.seeds,
            "num_return_sequences": copies,
            "schedule": chosen,
            "eos_token_id": list(eos_ids),
            "pad_token_id": pad_id,
        }
        return run, settings

    def _run(
        self, run: Run, call: arguments.Call, *, echo: bool, unshifted: bool, chunk_bytes: int
    ) -> tuple[Rows, dict[str, Any]]:
        """Prefill what logprobs of the prompt ask for, let transformers' loop generate the rest, collect."""
        ids, mask = run.layout()
        others = {name: value for name, value in call.to_model.items() if name != "past_key_values"}
        own_cache = call.to_model.get("past_key_values") is not None
        if own_cache and run.longest != run.shortest and not run.padded:
            raise ValueError(
                'past_key_values of a ragged batch is left-padded: take schedule="padded", or drop the cache'
            )
        if own_cache:
            arguments.check_cache(call.to_model["past_key_values"], run.start)
        # A cache of ours can be handed on unless the call says what cache to use.
        other_cache = (
            any(call.options.get(name) for name in arguments.CACHING) or call.options.get("use_cache") is False
        )
        can_hand_on = not own_cache and not other_cache
        cache = {"past_key_values": call.to_model["past_key_values"]} if own_cache else {}
        head: TokenScores | None = None
        prompt_rows: list[Scored] | None = None
        if echo and run.wants_scores:
            if unshifted:
                head, _ = score_columns(self, ids, ids, top=run.top, chunk_bytes=chunk_bytes, model_kwargs=others)
            elif not can_hand_on or (run.edited and run.start < run.longest):
                # Forced columns would show edited logits.
                prompt_rows = score_prompts(
                    self, run.prompts, top=run.top, chunk_bytes=chunk_bytes, model_kwargs=others
                )
            elif run.start > 1:
                head, prefilled = score_columns(
                    self,
                    ids[:, : run.start - 1],
                    ids[:, 1 : run.start],
                    attention_mask=mask[:, : run.start - 1] if run.padded else None,
                    top=run.top,
                    chunk_bytes=chunk_bytes,
                    model_kwargs=others,
                )
                cache = {} if prefilled is None else {"past_key_values": prefilled}
        if run.steps:
            # A view shares the weights; its fresh generation_config keeps the checkpoint's out of the loop.
            view = copy.copy(self)
            view.generation_config = GenerationConfig()
            processors = [*run.eos_processors(call.options), *(call.to_loop.get("logits_processor") or []), Step(run)]
            output = super(LlamaGenerationMixin, view).generate(
                ids,
                generation_config=run.config(call.options),
                attention_mask=mask,
                logits_processor=processors,
                stopping_criteria=[Stop(run, criteria(call.options, call.to_loop))],
                **{name: call.to_loop[name] for name in _TO_THE_LOOP if call.to_loop.get(name) is not None},
                **cache,
                **others,
            )
        else:
            output = GenerateDecoderOnlyOutput(sequences=ids)
            if call.to_loop.get("streamer") is not None:
                call.to_loop["streamer"].put(ids.cpu())
                call.to_loop["streamer"].end()
        rows = collect(run, output.sequences, head, prompt_rows, unshifted=unshifted)
        run.leave_generator(vocab_size_of(self))
        # Of the reference schedule's ragged columns a caller can make nothing; of the others what transformers gives.
        same_layout = run.padded or run.longest == run.shortest
        extras = {name: output[name] for name in _EXTRAS if same_layout and output.get(name) is not None}
        return rows, extras

    @torch.no_grad()
    def score_tokens(
        self,
        prompts: Tensor | Sequence[Sequence[int]],
        *,
        attention_mask: Tensor | None = None,
        top_logprobs: int = 0,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> LlamaScoreOutput:
        r"""Raw logprobs of given texts; nothing is generated, and rows do not see each other.

        Args:
            prompts (lists of token ids, or a `torch.LongTensor` of shape (B, T)): each as long as the model allows.
            attention_mask (`torch.Tensor` of shape (B, T), *optional*): of a padded tensor, on either side.
            top_logprobs (`int`): how many best tokens to report at each position.
            chunk_bytes (`int`): memory for the logits of one chunk of columns, 128 MiB if not given.

        Returns:
            [`LlamaScoreOutput`]: `logprobs`, natural logarithm, 0.0 for each row's first token.

        Raises:
            ValueError: a bad prompt (the row is named), or logits with nan or inf.

        >>> model.score_tokens([[1, 306, 4658], [1, 450]]).logprobs
        """
        refuse_encoder_decoder(self)
        top = check_int("top_logprobs", top_logprobs, least=0, most=vocab_size_of(self))
        chunk_bytes = check_int("chunk_bytes", chunk_bytes, least=1)
        _, rows = arguments.take_prompts(prompts, attention_mask, vocab_size_of(self))
        arguments.check_lengths(rows, context_of(self), name="the model's context")
        scores = score_prompts(self, rows, top=top, chunk_bytes=chunk_bytes)
        return LlamaScoreOutput(
            logprobs=[row.logprobs for row in scores],
            top_logprobs=[row.top_logprobs for row in scores] if top else None,
        )


_OWN_ARGUMENTS = [name for name in inspect.signature(LlamaGenerationMixin.generate).parameters if name != "self"]


class LlamaForCausalLM(LlamaGenerationMixin, transformers.LlamaForCausalLM):
    """transformers' `LlamaForCausalLM` with LLAMA2's `generate`; loads the same checkpoints."""


def with_llama_generation(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with `LlamaGenerationMixin`: a new object of a new class that shares all weights with `model`.

    Args:
        model: any decoder-only causal language model of transformers. It is left as it is.

    Raises:
        ValueError: the model is an encoder-decoder.

    >>> model = with_llama_generation(AutoModelForCausalLM.from_pretrained(name))
    """
    if isinstance(model, LlamaGenerationMixin):
        return model
    refuse_encoder_decoder(model)
    twin = copy.copy(model)
    model_class: Any = type(model)
    twin.__class__ = _with_mixin(model_class)
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


def _agreement(model: Any) -> Callable[[Tensor], Tensor] | None:
    """For a tensor-parallel model: hands every rank the first one's tokens (B,). Each rank draws for itself."""
    if (getattr(model, "tp_size", None) or 1) == 1 or not torch.distributed.is_initialized():
        return None
    meshes = (getattr(parameter, "device_mesh", None) for parameter in model.parameters())
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    names = (mesh.mesh_dim_names or ()) if mesh is not None else ()
    group = None if mesh is None else mesh.get_group("tp" if "tp" in names else 0)

    def agree(tokens: Tensor) -> Tensor:
        tokens = tokens.contiguous()
        torch.distributed.broadcast(tokens, torch.distributed.get_global_rank(group, 0) if group else 0, group)
        return tokens

    return agree
