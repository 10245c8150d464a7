"""Outputs of `generate` and `score_tokens`: arrange finished rows in the convention that was asked for.

What this module does not do: it computes no number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from ..text.openai import Choice, completions
from ..text.tokens import TokenSpeller, TokenTexts
from .plan import Plan
from .rows import Rows
from .scoring import NamedLogprobs, TopLogprobs
from .trimming import FinishReason, answer_span, finish_reason


@dataclass
class LlamaGenerateOutput(GenerateDecoderOnlyOutput):
    """The answer of `generate` for prompts given as lists, and whenever more than token ids was asked for.

    Args:
        sequences (`torch.LongTensor` of shape (B, T)): transformers' convention: left-padded prompt, as wide as it was
            given, completion with its EOS, then pad.
        tokens (`list[list[int]]`): Meta's convention: the completion (with `echo` after its prompt), cut before EOS.
        logprobs (`list[list[float]]`, *optional*): of the same tokens under the raw float32 logits, natural logarithm;
            0.0 for a row's first token. With processors that edit logits, completions' are those of the edited logits.
        sampled_logprobs (`list[list[float]]`, *optional*): under the distribution the token was drawn from, after
            temperature and nucleus; 0.0 where nothing was drawn (prompt tokens, greedy rows).
        temperature_logprobs (`list[list[float]]`, *optional*): after temperature, over the whole vocabulary; 0.0 where
            nothing was drawn, since greedy is the limit in which one token has all the mass.
        nucleus_mass (`list[list[float]]`, *optional*): the sum of the nucleus' probabilities after temperature; 1.0
            where nothing was drawn. `sampled_logprobs` are `temperature_logprobs` minus its logarithm.
        top_logprobs (`list[list[list[tuple[int, float]]]]`, *optional*): per position the k best ids with their raw
            logprobs, best first; empty for a row's first token.
        logprobs_of (`list[list[list[tuple[int, float, int]]]]`, *optional*): per position the ids that were asked for
            with their raw logprobs and ranks; empty for a row's first token.
        finish_reason (`list[str]`): per row `"stop"` (an EOS or a stopping criterion) or `"length"`.
        settings (`dict`): the settings in force.
        prompt_tokens (`list[list[int]]`): each row's prompt.

    >>> out = model.generate([[1, 5, 6], [1, 40]], max_gen_len=3, temperature=0, logprobs=True)
    >>> [len(row) for row in out.tokens], out.finish_reason
    ([3, 3], ['length', 'length'])
    """

    tokens: list[list[int]] | None = None
    logprobs: list[list[float]] | None = None
    sampled_logprobs: list[list[float]] | None = None
    temperature_logprobs: list[list[float]] | None = None
    nucleus_mass: list[list[float]] | None = None
    top_logprobs: list[list[TopLogprobs]] | None = None
    logprobs_of: list[list[NamedLogprobs]] | None = None
    finish_reason: list[FinishReason] | None = None
    settings: dict[str, Any] | None = None
    prompt_tokens: list[list[int]] | None = None

    def token_texts(self, tokenizer: Any) -> list[TokenTexts]:
        """What the answer's tokens spell: per row `text`, and per token `offsets` (characters), `bytes` and `pieces`.

        The text of an answer without `echo` is what follows its prompt in the decoded whole. An offset is the number of
        the answer's characters that are complete before a token, so the pieces between offsets add up to the text, and
        a character that several tokens spell belongs to the last of them.

        Args:
            tokenizer: a transformers tokenizer, or anything with the five members of Meta's.

        >>> model.generate([[1, 367]], max_gen_len=2, temperature=0).token_texts(tokenizer)[0].offsets
        [0, 1]
        """
        return [row.texts for row in self.choices(TokenSpeller(tokenizer))]

    def to_openai(self, tokenizer: Any, *, model: str = "hf_llama_sampling") -> dict[str, Any]:
        """The answer in the completions format of OpenAI's API.

        `logprobs` of a choice hold `tokens` (they add up to its `text`), `token_logprobs` and `top_logprobs` (null for
        a token that nothing stands before; -9999.0 for less than that, as in that API), `text_offset`, counted from the
        beginning of the choice's `text`, and `bytes`. The best tokens are named by their own texts, or as
        `bytes:\\xe4` where they spell no whole character.

        Args:
            tokenizer: as for `token_texts`.
            model: the name that the answer gives.

        Raises:
            ValueError: `top_logprobs` were asked for, and the tokens' own logprobs were not.
        """
        if self.top_logprobs is not None and self.logprobs is None:
            raise ValueError("to_openai needs the tokens' own logprobs beside top_logprobs: call with logprobs=True")
        speller = TokenSpeller(tokenizer)
        return completions(self.choices(speller), speller, model)

    def choices(self, speller: TokenSpeller) -> list[Choice]:
        """The rows as choices of OpenAI's format."""
        assert self.tokens is not None and self.prompt_tokens is not None and self.finish_reason is not None
        echo = bool(self.settings and self.settings["echo"])
        choices = []
        for row, (prompt, tokens) in enumerate(zip(self.prompt_tokens, self.tokens, strict=True)):
            before = [] if echo else prompt
            choices.append(
                Choice(
                    texts=speller.texts([*before, *tokens], given=len(before)),
                    ids=tokens,
                    logprobs=None if self.logprobs is None else self.logprobs[row],
                    top_logprobs=None if self.top_logprobs is None else self.top_logprobs[row],
                    unscored=int(echo),
                    prompt=len(prompt),
                    completion=max(0, len(tokens) - len(prompt)) if echo else len(tokens),
                    finish_reason=self.finish_reason[row],
                )
            )
        return choices


@dataclass
class LlamaScoreOutput(ModelOutput):
    """The answer of `score_tokens`; a row's lists begin at its `start`, or with its first token if none is given.

    Args:
        logprobs (`list[list[float]]`): raw logprob of each token given those before it. Where nothing stands before a
            text's first token, its place holds 0.0, which is no logprob.
        top_logprobs (`list[list[list[tuple[int, float]]]]`, *optional*): per position the k best ids with their raw
            logprobs, best first; empty where nothing stands before.
        logprobs_of (`list[list[list[tuple[int, float, int]]]]`, *optional*): per position the ids that were asked for
            with their raw logprobs and ranks; empty where nothing stands before.
        totals (`list[float]`): per row the sum of the logprobs of the tokens that were scored.
        counts (`list[int]`): per row how many tokens were scored: what a perplexity divides by.
        prompt_tokens (`list[list[int]]`): the texts, whole.
    """

    logprobs: list[list[float]] | None = None
    top_logprobs: list[list[TopLogprobs]] | None = None
    logprobs_of: list[list[NamedLogprobs]] | None = None
    totals: list[float] | None = None
    counts: list[int] | None = None
    prompt_tokens: list[list[int]] | None = None

    def token_texts(self, tokenizer: Any) -> list[TokenTexts]:
        """What the scored tokens spell: see `LlamaGenerateOutput.token_texts`."""
        return [row.texts for row in self.choices(TokenSpeller(tokenizer))]

    def to_openai(self, tokenizer: Any, *, model: str = "hf_llama_sampling") -> dict[str, Any]:
        """The texts in the completions format of OpenAI's API, as echoed prompts that nothing was generated for.

        See `LlamaGenerateOutput.to_openai`. lm-evaluation-harness leaves out the last token of such an answer, since it
        asks servers for one new token: for its own parser `generate(max_gen_len=1, echo=True)`.
        """
        speller = TokenSpeller(tokenizer)
        return completions(self.choices(speller), speller, model)

    def choices(self, speller: TokenSpeller) -> list[Choice]:
        """The rows as choices of OpenAI's format."""
        assert self.prompt_tokens is not None and self.logprobs is not None and self.counts is not None
        choices = []
        for row, (text, logprobs) in enumerate(zip(self.prompt_tokens, self.logprobs, strict=True)):
            start = len(text) - len(logprobs)
            choices.append(
                Choice(
                    texts=speller.texts(text, given=start),
                    ids=text[start:],
                    logprobs=logprobs,
                    top_logprobs=None if self.top_logprobs is None else self.top_logprobs[row],
                    unscored=len(logprobs) - self.counts[row],
                    prompt=len(text),
                    completion=0,
                    finish_reason="length",
                )
            )
        return choices


def sequences_of(rows: Rows, plan: Plan, columns: int = 0) -> Tensor:
    """Lay out rows (B, T) in transformers' convention: all prompts end in one column, pad follows completions.

    Prompts take at least `columns`, the width of the padded tensor that they came in: callers cut it off.

    >>> # prompts [1, 5] and [1, 6, 7], completions [8, 9] and [8], pad 0
    >>> # [[0, 1, 5, 8, 9],
    >>> #  [1, 6, 7, 8, 0]]
    """
    begin = max(plan.longest, columns)
    lines = [[plan.pad_id] * (begin - length) + text for text, length in zip(rows.tokens, plan.lengths, strict=True)]
    width = max(map(len, lines))
    return torch.tensor([line + [plan.pad_id] * (width - len(line)) for line in lines], device=plan.device)


def widened(extras: dict[str, Any], plan: Plan, columns: int) -> dict[str, Any]:
    """Put zeros where the prompts' padding was given, so that hidden states and attentions line up with `sequences`.

    Args:
        extras: hidden states (B, T, H) and attentions (B, heads, T, columns so far), per step and layer.
        plan: the layout that they come in.
        columns: how many columns the prompts took as they were given.
    """
    more, width = columns - plan.longest, plan.longest

    def wide(tensor: Any, step: int, name: str) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        rows = (more, 0) if step == 0 and tensor.shape[1 if name == "hidden_states" else 2] == width else (0, 0)
        if name == "hidden_states":
            return pad(tensor, (0, 0, *rows))
        return pad(tensor, (more if tensor.shape[-1] == width + step else 0, 0, *rows))

    if more <= 0:
        return extras
    changed: dict[str, Any] = {
        name: tuple(tuple(wide(one, step, name) for one in layers) for step, layers in enumerate(extras[name]))
        for name in ("hidden_states", "attentions")
        if name in extras
    }
    return {**extras, **changed}


def generate_output(rows: Rows, plan: Plan, sequences: Tensor, extras: dict[str, Any]) -> LlamaGenerateOutput:
    """Build the output in Meta's convention: completions cut before EOS, with their logprobs.

    Args:
        rows: the rows of the run.
        plan: the plan of the call.
        sequences: the rows in transformers' convention.
        extras: further outputs of transformers' loop: logits, attentions, hidden states, a cache.
    """
    texts = list(zip(rows.tokens, plan.lengths, strict=True))
    spans = [
        answer_span(text, length, echo=plan.echo, eos_ids=plan.eos_ids, compat=plan.compat) for text, length in texts
    ]

    def cut(lists: list[list[Any]]) -> list[list[Any]]:
        return [items[span] for items, span in zip(lists, spans, strict=True)]

    return LlamaGenerateOutput(
        sequences=sequences,
        tokens=cut(rows.tokens),
        logprobs=cut(rows.logprobs) if plan.logprobs or plan.sampling_logprobs else None,
        sampled_logprobs=cut(rows.sampled_logprobs) if plan.logprobs or plan.sampling_logprobs else None,
        temperature_logprobs=cut(rows.temperature_logprobs) if plan.sampling_logprobs else None,
        nucleus_mass=cut(rows.nucleus_mass) if plan.sampling_logprobs else None,
        top_logprobs=cut(rows.top_logprobs) if plan.top_logprobs else None,
        logprobs_of=cut(rows.logprobs_of) if any(plan.named) else None,
        finish_reason=[
            finish_reason(text[length:], plan.eos_ids, stopped=stopped)
            for (text, length), stopped in zip(texts, rows.stopped, strict=True)
        ],
        settings=_settings_in_force(plan),
        prompt_tokens=[list(prompt) for prompt in plan.prompts],
        **extras,
    )


def _settings_in_force(plan: Plan) -> dict[str, Any]:
    """Collect the settings to report: one value if all rows share it, else one per row."""
    sampling = plan.sampling
    return {
        "temperature": _listed(sampling.temperature),
        "top_p": _listed(sampling.top_p),
        "max_gen_len": plan.gen_lens[0] if len(set(plan.gen_lens)) == 1 else plan.gen_lens,
        "max_seq_len": plan.max_seq_len,
        "seeds": _listed(sampling.seeds),
        "num_return_sequences": plan.num_return_sequences,
        "schedule": plan.schedule,
        "eos_token_id": list(plan.eos_ids),
        "pad_token_id": plan.pad_id,
        "compat": plan.compat,
        "echo": plan.echo,
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) else value
