"""LLAMA2's distribution under transformers' own `generate`, on any causal language model.

python examples/warpers_in_transformers.py MODEL  # hf_llama_sampling/tiny_llama is the bundled one
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llama_sampling import LlamaTemperatureLogitsWarper, LlamaTopPLogitsWarper


def main(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    inputs = tokenizer("JULIET:\nO", return_tensors="pt")

    torch.manual_seed(1)
    output = model.generate(
        **inputs,
        do_sample=True,
        max_new_tokens=40,
        logits_processor=[LlamaTemperatureLogitsWarper(0.6), LlamaTopPLogitsWarper(0.9)],
        temperature=1.0,  # transformers' own warpers come after these: switch them off
        top_p=1.0,
        top_k=0,
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
