"""The public API as a user's typed program calls it: checked by mypy, in `make test` and by tests of the wheel.

Each `type: ignore` stands on a wrong call: mypy complains of one that hides no error, so the types catch it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import torch

from hf_llama_sampling import (
    ChatPrediction,
    CompletionPrediction,
    Dialog,
    Llama,
    LlamaContinuationOutput,
    LlamaForCausalLM,
    LlamaGenerateOutput,
    LlamaSampler,
    LlamaScoreOutput,
    LlamaTemperatureLogitsWarper,
    LlamaTopPLogitsWarper,
    Tokenizer,
    batch,
    sample_top_p,
    with_llama_generation,
)


def by_the_llama_compatible_api(folder: Path) -> list[CompletionPrediction]:
    """Text in, text out."""
    llama = Llama.build(str(folder), str(folder / "tokenizer.model"), max_seq_len=512, max_batch_size=4)
    assert_type(llama, Llama)
    dialog: Dialog = [{"role": "user", "content": "What is Paris?"}]
    answers = llama.chat_completion([dialog], max_gen_len=8)
    assert_type(answers, list[ChatPrediction])
    assert_type(answers[0]["generation"]["content"], str)
    assert_type(llama.generate([[1, 2]], max_gen_len=4), tuple[list[list[int]], list[list[float]] | None])
    llama.text_completion(["The king"], max_gen_len="8")  # type: ignore[arg-type]
    return llama.text_completion(["The king"], temperature=0.6, top_p=0.9, logprobs=True)


def by_the_transformers_api(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Ids in, ids out."""
    output = model.generate([[1, 2], [1]], max_gen_len=4, temperature=[0.0, 0.6], seeds=[1, 2], logprobs=True)
    assert_type(output, LlamaGenerateOutput | torch.Tensor)
    assert_type(model.score_tokens(ids), LlamaScoreOutput)
    assert_type(model.score_continuations([[1]], [[[2], [3]]]), LlamaContinuationOutput)
    model.generate(ids, max_gen_len="four")  # type: ignore[arg-type]
    model.generate(ids, schedule="dense")  # type: ignore[arg-type]
    with_llama_generation(model)


def by_the_processors(probs: torch.Tensor) -> list[Callable[..., Any]]:
    """The rule for anybody's generate."""
    assert_type(sample_top_p(probs, 0.9), torch.Tensor)
    LlamaTopPLogitsWarper("0.9")  # type: ignore[arg-type]
    return [LlamaTemperatureLogitsWarper(0.6), LlamaTopPLogitsWarper(0.9), LlamaSampler(0.6, 0.9, seeds=[1, 2])]


def by_files(llama: Llama, tokenizer: Tokenizer) -> int:
    """A batch run, and a tokenizer by itself."""
    assert_type(tokenizer.encode("The king", bos=True, eos=False), list[int])
    assert_type(tokenizer.decode([1, 2]), str)
    return batch.run(llama, "in.jsonl", Path("out.jsonl"), max_gen_len=8, seed=1).records
