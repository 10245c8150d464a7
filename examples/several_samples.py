"""Several samples of each prompt, which come out the same in any batch, with the probability of each.

python examples/several_samples.py MODEL  # hf_llama_sampling/tiny_llama is the bundled one
"""

import math
import sys

from transformers import AutoTokenizer

from hf_llama_sampling import LlamaForCausalLM


def main(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = LlamaForCausalLM.from_pretrained(name, dtype="float32")
    texts = ["ROMEO:", "The king is"]
    prompts, samples = tokenizer(texts).input_ids, 3

    output = model.generate(prompts, max_gen_len=16, seeds=[7, 8], num_return_sequences=samples, logprobs=True)
    for row, (tokens, drawn) in enumerate(zip(output.tokens, output.sampled_logprobs, strict=True)):
        completion = tokenizer.decode(tokens, skip_special_tokens=True)
        print(f"{texts[row // samples]!r} -> {completion!r}, drawn with probability {math.exp(sum(drawn)):.1e}")

    alone = model.generate(prompts[1:], max_gen_len=16, seeds=[8], num_return_sequences=samples)
    print("the second prompt alone gives the same samples:", alone.tokens == output.tokens[samples:])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
