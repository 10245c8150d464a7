"""Talk with a chat model in the format of its own template, by the `llama`-compatible API.

python examples/chat_template.py MODEL
"""

import sys

from hf_llama_sampling import Dialog, Llama


def main(name: str) -> None:
    generator = Llama.build(name, tokenizer_path=name, max_seq_len=512, max_batch_size=4)
    dialog: Dialog = [{"role": "user", "content": "What is Paris?"}]

    for question in ("And London?", "Which is larger?"):
        print(f"user: {dialog[-1]['content']} ({len(generator.encode_dialog(dialog, 'template'))} tokens so far)")
        (answer,) = generator.chat_completion([dialog], max_gen_len=32, temperature=0.0, chat_format="template")
        print(f"assistant: {answer['generation']['content']}")
        dialog = [*dialog, answer["generation"], {"role": "user", "content": question}]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
