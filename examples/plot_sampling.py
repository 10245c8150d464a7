"""Draw three pictures of LLAMA2's sampling: temperature, the nucleus, and where transformers' rule differs.

    python examples/plot_sampling.py OUT.png [MODEL]

MODEL is a transformers folder or a GGUF file; the bundled model if it is left out.
"""

import sys

import matplotlib
import numpy as np
import torch

from hf_llama_sampling import Llama, LlamaTopPLogitsWarper
from hf_llama_sampling.cli import BUNDLED

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from transformers import TopPLogitsWarper


def main(file: str, name: str = str(BUNDLED)) -> None:
    llama = Llama.build(name, name, None, None, dtype="float32")
    figure, ((heat, flat), (peaked, edge)) = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.patch.set_facecolor("white")
    logits = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0])
    for place, temperature in enumerate((0.1, 0.5, 1, 2)):
        heights = torch.softmax(logits / temperature, -1).tolist()
        heat.bar(
            [token + 0.2 * place - 0.3 for token in range(5)], heights, width=0.19, label=f"temperature {temperature}"
        )
    heat.set(title="softmax(logits / temperature)", xlabel="token, by logit", ylabel="probability")
    heat.legend()
    texts = ("I think that the", "To be, or not to", "ROMEO")  # the flattest and the most peaked are drawn
    drawn = [(text, next_token(llama, text).sort(descending=True).values.numpy()) for text in texts]
    drawn.sort(key=lambda pair: nucleus_size(pair[1]))
    for axes, (text, probs) in ((flat, drawn[-1]), (peaked, drawn[0])):
        kept = nucleus_size(probs)
        edges = np.arange(len(probs) + 1) + 0.5  # of the bars, by rank
        axes.stairs(probs[kept:], edges[kept:], fill=True, color="lightgray", label="dropped")
        axes.stairs(probs[:kept], edges[: kept + 1], fill=True, color="tab:blue", label=f"kept at p = 0.9: {kept}")
        axes.axvline(kept + 0.5, color="black", linestyle=":")
        axes.set(title=f"next token after {text!r}", xlabel="rank", ylabel="probability", xscale="log", ylim=(0, None))
        axes.legend()
    example = torch.tensor([[0.5, 0.25, 0.25]])
    ours = LlamaTopPLogitsWarper(0.5)(None, example.log()).exp()[0]
    theirs = TopPLogitsWarper(0.5)(None, example.log()).exp()[0]
    edge.bar([-0.2, 0.8, 1.8], ours.tolist(), width=0.38, label="LLAMA2: drop where the mass before exceeds p")
    edge.bar([0.2, 1.2, 2.2], theirs.tolist(), width=0.38, label="transformers: drop where the tail is within 1 - p")
    edge.set(title="[0.5, 0.25, 0.25] at p = 0.5: kept tokens", xticks=[0, 1, 2], xlabel="token", ylabel="probability")
    edge.set_ylim(0, 0.7)
    edge.legend()
    figure.savefig(file, dpi=110)


def nucleus_size(probs: np.ndarray) -> int:
    """How many tokens of a distribution, best first, LLAMA2 keeps at p = 0.9."""
    return int((probs.cumsum() - probs <= 0.9).sum())


def next_token(llama: Llama, text: str) -> torch.Tensor:
    """The distribution (V,) of the token after a text."""
    with torch.inference_mode():
        ids = torch.tensor([llama.tokenizer.encode(text, bos=llama.tokenizer.bos_id >= 0, eos=False)])
        return torch.softmax(llama.model(input_ids=ids).logits[0, -1].float(), dim=-1)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
