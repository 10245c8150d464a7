"""Show each token with its log-probability as soon as it is drawn: a processor sees the logits, a streamer the token.

python examples/streaming_logprobs.py MODEL  # hf_llama_sampling/tiny_llama is the bundled one
"""

import sys

import torch
from transformers import AutoTokenizer, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from hf_llama_sampling import LlamaForCausalLM


class Live(LogitsProcessor, BaseStreamer):
    """Prints what is drawn; as a processor it changes nothing."""

    def __init__(self, tokenizer: AutoTokenizer) -> None:
        self.tokenizer, self.logprobs = tokenizer, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logprobs = scores.log_softmax(dim=-1)  # (1, V), of the raw logits
        return scores

    def put(self, value: torch.Tensor) -> None:
        if self.logprobs is not None:  # the prompt comes first, before any logits
            print(f"{self.tokenizer.decode(value)!r} {self.logprobs[0, value.item()]:.2f}", flush=True)

    def end(self) -> None:
        print("end")


def main(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = LlamaForCausalLM.from_pretrained(name, dtype="float32")
    prompts, live = tokenizer(["ROMEO:"]).input_ids, Live(tokenizer)
    out = model.generate(prompts, max_gen_len=8, seeds=1, streamer=live, logits_processor=[live], logprobs=True)
    print("the answer's own:", *(f"{logprob:.2f}" for logprob in out.logprobs[0]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
