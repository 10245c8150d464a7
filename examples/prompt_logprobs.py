"""Echo with log-probabilities for a ragged batch, one random stream per prompt, and the perplexity of texts.

python examples/prompt_logprobs.py MODEL  # hf_llama_sampling/tiny_llama is the bundled one
"""

import math
import sys

from transformers import AutoTokenizer

from hf_llama_sampling import LlamaForCausalLM


def main(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = LlamaForCausalLM.from_pretrained(name, dtype="float32")
    prompts = tokenizer(["ROMEO:\nShe", "To be, or not to be: that is the"]).input_ids

    output = model.generate(prompts, max_gen_len=24, seeds=7, echo=True, logprobs=True)
    for tokens, logprobs, reason in zip(output.tokens, output.logprobs, output.finish_reason, strict=True):
        print(tokenizer.decode(tokens, skip_special_tokens=True))
        print(f"{len(tokens)} tokens, perplexity {perplexity(logprobs):.1f}, ended by {reason}\n")

    texts = ["the king", "king the"]
    scores = model.score_tokens(tokenizer(texts).input_ids)
    for text, total, count in zip(texts, scores.totals, scores.counts, strict=True):
        print(f"{text!r}: {total:.2f} nats, perplexity {math.exp(-total / count):.1f} over {count} tokens")


def perplexity(logprobs: list[float]) -> float:
    """Per scored token: nothing stands before a text's first one, so its 0.0 is no logprob."""
    scored = logprobs[1:]
    return math.exp(-sum(scored) / len(scored))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
