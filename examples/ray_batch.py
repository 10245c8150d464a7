"""Answer a JSONL file of prompts with Ray: a model per actor, on as many machines as the cluster has, no shared disk.

    python examples/ray_batch.py MODEL IN.jsonl OUT.jsonl ACTORS

Needs the extra `ray`. Lines and answers are those of `hf-llama-sampling batch`; equal lines need a `seed` each, and the
`line` of an error counts within its block.
"""

import sys
import tempfile
from pathlib import Path

try:
    import ray
except ModuleNotFoundError:
    sys.exit("ray_batch.py needs Ray: pip install 'hf-llama-sampling[ray]'")

from hf_llama_sampling import Llama, batch


class Answers:
    """Loads the model once, then answers block after block of records."""

    def __init__(self, name: str) -> None:
        self.llama = Llama.build(name, name, None, 32)

    def __call__(self, block: dict) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            asked, answered = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
            asked.write_text("".join(f"{line}\n" for line in block["text"]), encoding="utf-8")
            batch.run(self.llama, asked, answered, max_gen_len=32, seed=1)
            return {"text": answered.read_text(encoding="utf-8").splitlines()}


def main(name: str, asked: str, answered: str, actors: str = "1") -> None:
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    records = ray.data.read_text(asked, drop_empty_lines=False, override_num_blocks=2 * int(actors))
    pool = ray.data.ActorPoolStrategy(size=int(actors))
    # On GPUs, num_gpus=1 in place of num_cpus. Half a CPU each leaves some for the tasks that read.
    answers = records.map_batches(Answers, fn_constructor_args=(name,), batch_size=64, compute=pool, num_cpus=0.5)
    with open(answered, "w", encoding="utf-8") as file:
        file.writelines(f"{row['text']}\n" for row in answers.iter_rows())


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
