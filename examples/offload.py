"""Run a model that does not fit the memory: some layers stay on the disk and are fetched in each step.

python examples/offload.py MODEL  # hf_llama_sampling/tiny_llama is the bundled one
"""

import sys

from transformers import AutoConfig

from hf_llama_sampling import Llama


def main(name: str) -> None:
    layers = AutoConfig.from_pretrained(name).num_hidden_layers
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "cpu" if layer < layers // 2 else "disk" for layer in range(layers)}
    # On a machine with GPUs, device_map="auto" and max_memory={0: "10GiB", "cpu": "30GiB"} make such a mapping.
    generator = Llama.build(name, name, 512, 4, device_map=places, dtype="float32")

    on_disk = sum(weight.numel() for weight in generator.model.parameters() if weight.device.type == "meta")
    print(f"{on_disk:,} of {sum(weight.numel() for weight in generator.model.parameters()):,} weights are on the disk")
    for answer in generator.text_completion(["ROMEO:", "The king is"], max_gen_len=16):
        print(repr(answer["generation"]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
