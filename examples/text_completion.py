"""Complete prompts as a script for the `llama` package does; only its import line is another.

python examples/text_completion.py CKPT_DIR TOKENIZER_PATH

The bundled model: CKPT_DIR is hf_llama_sampling/tiny_llama, TOKENIZER_PATH its tokenizer.model.
"""

import sys

from hf_llama_sampling import Llama


def main(ckpt_dir: str, tokenizer_path: str) -> None:
    generator = Llama.build(ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path, max_seq_len=128, max_batch_size=4)

    prompts = [
        "I believe the meaning of life is",
        "ROMEO:\nBut soft, what light through yonder window breaks?",
        "The king is",
    ]
    results = generator.text_completion(prompts, max_gen_len=64, temperature=0.6, top_p=0.9)
    for prompt, result in zip(prompts, results, strict=True):
        print(prompt)
        print(f"> {result['generation']}")
        print("\n==================================\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
