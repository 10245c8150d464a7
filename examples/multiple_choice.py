"""Answer multiple-choice questions by log-probability; the common header and each question are read once.

python examples/multiple_choice.py MODEL  # hf_llama_sampling/tiny_llama is the bundled one
"""

import sys

from transformers import AutoTokenizer

from hf_llama_sampling import LlamaForCausalLM

HEADER = "Who speaks next?\nROMEO: love -> JULIET\nJULIET: night -> ROMEO\n"
QUESTIONS = {"KING: war ->": [" the queen", " JULIET", " First Citizen"], "DUKE: peace ->": [" ROMEO", " the king"]}


def main(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = LlamaForCausalLM.from_pretrained(name, dtype="float32")

    contexts = [tokenizer(HEADER + question).input_ids for question in QUESTIONS]
    choices = [tokenizer(texts, add_special_tokens=False).input_ids for texts in QUESTIONS.values()]
    scores = model.score_continuations(contexts, choices)

    for (question, texts), totals in zip(QUESTIONS.items(), scores.totals, strict=True):
        print(question)
        for text, total in sorted(zip(texts, totals, strict=True), key=lambda pair: -pair[1]):
            print(f"  {total:8.2f} nats, {total / len(text):6.2f} per character: {text.strip()}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
