"""Echo with log-probabilities for a ragged batch, one random stream per prompt.

python examples/prompt_logprobs.py MODEL
"""

import sys

import torch
from transformers import AutoTokenizer

from hf_llama_sampling import LlamaForCausalLM


def main(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = LlamaForCausalLM.from_pretrained(name, dtype=torch.float32)
    prompts = [tokenizer(text).input_ids for text in ("ROMEO:\nShe", "To be, or not to be: that is the")]

    output = model.generate(prompts, max_gen_len=24, seeds=7, echo=True, logprobs=True)
    for tokens, logprobs, reason in zip(output.tokens, output.logprobs, output.finish_reason, strict=True):
        print(tokenizer.decode(tokens, skip_special_tokens=True))
        print(f"{len(tokens)} tokens, mean logprob {sum(logprobs) / len(logprobs):.3f}, ended by {reason}\n")

    texts = [tokenizer(text).input_ids for text in ("the king", "king the")]
    print("scores:", [round(sum(row), 2) for row in model.score_tokens(texts).logprobs])


if __name__ == "__main__":
    main(*sys.argv[1:])
