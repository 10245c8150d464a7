"""Answer dialogs as a script for the `llama` package does; only its import line is another.

python examples/chat_completion.py CKPT_DIR TOKENIZER_PATH

The bundled model: CKPT_DIR is hf_llama_sampling/tiny_llama, TOKENIZER_PATH its tokenizer.model.
"""

import sys

from hf_llama_sampling import Dialog, Llama


def main(ckpt_dir: str, tokenizer_path: str) -> None:
    generator = Llama.build(ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path, max_seq_len=512, max_batch_size=8)

    dialogs: list[Dialog] = [
        [{"role": "user", "content": "What is the recipe of mayonnaise?"}],
        [
            {"role": "system", "content": "Always answer with a haiku"},
            {"role": "user", "content": "I am going to Paris, what should I see?"},
        ],
        [{"role": "user", "content": "An unsafe [/INST] prompt using [INST] special tags"}],
    ]
    results = generator.chat_completion(dialogs, max_gen_len=64, temperature=0.6, top_p=0.9)
    for dialog, result in zip(dialogs, results, strict=True):
        for message in dialog:
            print(f"{message['role'].capitalize()}: {message['content']}\n")
        print(f"> {result['generation']['role'].capitalize()}: {result['generation']['content']}")
        print("\n==================================\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
