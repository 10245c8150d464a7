"""LLAMA2's generation loop, as plain as it gets: slow, obvious, for reading, for tests and for `parity`.

It follows facebookresearch/llama, ``llama/generation.py`` (``Llama.generate``, ``sample_top_p``) step by step, quirks
included, on any transformers causal LM. It imports nothing of the rest of this package, so that the rest can be checked
against it.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch


def reference_sample_top_p(probs: torch.Tensor, p: float, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one token per row from the nucleus of `probs` (B, V); returns ids (B, 1)."""
    probs_sort, probs_idx = torch.sort(probs, dim=-1, descending=True)
    mass_before = torch.cumsum(probs_sort, dim=-1) - probs_sort
    probs_sort[mass_before > p] = 0.0
    probs_sort /= probs_sort.sum(dim=-1, keepdim=True)
    rank = torch.multinomial(probs_sort, num_samples=1, generator=generator)
    return torch.gather(probs_idx, -1, rank)


@torch.no_grad()
def reference_generate(
    model: Any,
    prompt_tokens: Sequence[Sequence[int]],
    *,
    max_gen_len: int,
    max_seq_len: int,
    eos_ids: Sequence[int],
    temperature: float = 0.6,
    top_p: float = 0.9,
    logprobs: bool = False,
    echo: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[list[list[int]], list[list[float]] | None]:
    """Complete a ragged batch of prompts, one column at a time; returns (tokens, logprobs or None), lists per row."""
    device, pad = model.device, -1
    lengths = [len(prompt) for prompt in prompt_tokens]
    total_len = min(max_seq_len, max_gen_len + max(lengths))
    tokens = torch.full((len(lengths), total_len), pad, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompt_tokens):
        tokens[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long, device=device)
    given = tokens != pad
    scores = torch.zeros(tokens.shape, device=device)
    finished = torch.zeros(len(lengths), dtype=torch.bool, device=device)
    stops = torch.tensor(list(eos_ids), dtype=torch.long, device=device)

    # Releases of transformers from 5.24 on give the argument and the output another name.
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache, start = None, 0
    if min(lengths) == total_len:  # nothing to generate: the reference scores position t against the token at t
        logits = model(tokens).logits.float()
        scores = torch.log_softmax(logits, -1).gather(-1, tokens[:, :, None]).squeeze(-1)
    for column in range(min(lengths), total_len):
        output = model(tokens[:, start:column], **{cache_name: cache}, use_cache=True)
        cache, logits = getattr(output, cache_name), output.logits.float()
        if temperature > 0:
            token = reference_sample_top_p(torch.softmax(logits[:, -1] / temperature, -1), top_p, generator=generator)
        else:
            token = torch.argmax(logits[:, -1], dim=-1, keepdim=True)
        tokens[:, column] = torch.where(given[:, column], tokens[:, column], token.squeeze(-1))
        targets = tokens[:, start + 1 : column + 1, None]
        scores[:, start + 1 : column + 1] = torch.log_softmax(logits, -1).gather(-1, targets).squeeze(-1)
        finished |= ~given[:, column] & torch.isin(tokens[:, column], stops)
        start = column
        if finished.all():
            break

    answers, answer_scores = [], []
    for row, length in enumerate(lengths):
        first = 0 if echo else length
        answer = tokens[row, first : length + max_gen_len].tolist()
        score = scores[row, first : length + max_gen_len].tolist()
        end = next((i for i, token in enumerate(answer) if token in eos_ids), len(answer))
        answers.append(answer[:end])
        answer_scores.append(score[:end])
    return answers, answer_scores if logprobs else None
