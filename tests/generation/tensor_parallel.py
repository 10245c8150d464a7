"""What `tests/test_tensor_parallel.py` launches: every case on this rank's part of the bundled model, into a file."""

import json
import sys
from pathlib import Path

import torch

import hf_llama_sampling
from hf_llama_sampling import LlamaForCausalLM
from hf_llama_sampling.generation import plan

TINY = Path(hf_llama_sampling.__file__).parent / "tiny_llama"
RAGGED = [[1, 5, 6, 7, 8, 9, 10, 11], [1, 300], [1, 40, 50, 60]]
EVEN = [[1, 5, 6], [1, 7, 300]]
HOT = {"max_gen_len": 24, "temperature": 1.5, "top_p": 1.0, "eos_token_id": []}
CASES = {
    "even": (EVEN, HOT),
    "ragged, padded": (RAGGED, HOT | {"schedule": "padded"}),
    "ragged, dense": (RAGGED, HOT | {"schedule": "reference"}),
    "until EOS": (EVEN, {"max_gen_len": 200, "temperature": 1.0, "logprobs": True, "echo": True}),
    "one stream per prompt": (RAGGED, HOT | {"seeds": 5}),
    "greedy and sampled": (EVEN, HOT | {"temperature": [0, 1.5]}),
}


def answers(model, seed, cases=CASES):
    """Tokens and logprobs of every case, the generator seeded anew for each."""
    found = {}
    for name, (prompts, settings) in cases.items():
        torch.manual_seed(seed)
        output = model.generate(prompts, **settings)
        found[name] = {"tokens": output.tokens, "logprobs": output.logprobs}
    return found


def main():
    """Each rank seeds its generator with its own number."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32, tp_plan="auto").eval()
    found = answers(model, rank)
    plan.token_broadcast = lambda model: None
    found["each for itself"] = answers(model, rank, {"even": CASES["even"]})["even"]
    weight = model.model.layers[0].mlp.down_proj.weight
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    found["part of a weight"] = local.numel() / weight.numel()
    Path(sys.argv[1], str(rank)).write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
