"""Requests that come and go in one batch, each with settings and a seed of its own, streamed as they are drawn.

python examples/continuous_batching.py MODEL  # hf_llama_sampling/tiny_llama is the bundled one
"""

import sys

from transformers import AutoTokenizer

from hf_llama_sampling import LlamaForCausalLM


def main(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = LlamaForCausalLM.from_pretrained(name, dtype="float32")
    texts = ["ROMEO:", "JULIET:", "The king is", "First Citizen:"]
    prompts = tokenizer(texts).input_ids

    finished = {}
    with model.continuous_batching_context_manager(max_gen_len=16, temperature=0.8) as manager:
        manager.add_request(prompts[0], "ROMEO", seed=1, streaming=True)
        for result in manager.request_id_iter("ROMEO"):
            print(tokenizer.decode(result.generated_tokens[-1:]), end="|")
            if len(result.generated_tokens) == 4:  # the others come while it is in flight
                for text, prompt in zip(texts[1:], prompts[1:], strict=True):
                    manager.add_request(prompt, text, seed=2, temperature=0 if text == "The king is" else 1.0)
        while len(finished) < len(texts) - 1:
            result = manager.get_result()
            finished[result.request_id] = result.generated_tokens
    for text in texts[1:]:
        print(f"\n{text!r} -> {tokenizer.decode(finished[text], skip_special_tokens=True)!r}", end="")

    alone = model.generate([prompts[1]], max_gen_len=16, temperature=1.0, seeds=[2])
    same = tokenizer.decode(alone.tokens[0]) == tokenizer.decode(finished["JULIET:"], skip_special_tokens=True)
    print("\nJULIET's lines are those of generate:", same)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
