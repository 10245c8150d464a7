"""Two processes of one thread each against one, in batch runs: records per second, in pairs.

    OMP_NUM_THREADS=1 python tests/benchmarks/processes.py MODEL [--pairs 3] [--records 48]

MODEL is a GGUF file, a transformers folder or a Hub id. It is loaded once, in float32, and each run's processes
are forked from there, so that only the runs are timed: reading, answering, syncing and merging. The machine should be
quiet: the first line prints what two busy processes reach that share nothing, which is the most that a run can. Where
it is not quiet, the ratio by processor time tells how evenly the work is dealt, though not what the memory bus does.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from hf_llama_sampling import Llama

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.batch.processes import run

WORDS = ["the", "king", "and", "queen", "of", "love", "to", "thee", "my", "lord", "what", "shall", "I", "say"]


def records(count):
    """Prompts of 16 to 128 words."""
    rng = random.Random(0)
    return [{"prompt": " ".join(rng.choices(WORDS, k=rng.randint(16, 128)))} for _ in range(count)]


def alone(llama, seconds=4.0):
    """Forward passes in so many seconds, in each of `count` forked processes that share nothing."""
    ids = torch.randint(3, 100, (8, 64), generator=torch.Generator().manual_seed(0))

    def passes(count):
        pipes = []
        for _ in range(count):
            readable, writable = os.pipe()
            if os.fork() == 0:
                end, done = time.monotonic() + seconds, 0
                with torch.no_grad():
                    while time.monotonic() < end:
                        llama.model(ids)
                        done += 1
                os.write(writable, str(done).encode())
                os._exit(0)
            os.close(writable)
            pipes.append(readable)
        found = sum(int(os.read(pipe, 20)) for pipe in pipes)
        for pipe in pipes:
            os.close(pipe)
            os.wait()
        return found

    return passes(2) / passes(1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--records", type=int, default=48)
    parser.add_argument("--max-gen-len", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    llama = Llama.build(arguments.model, arguments.model, None, None, dtype=torch.float32)
    print(f"two processes that share nothing: {alone(llama):.2f} x one")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records(arguments.records)))
        options = {"max_gen_len": arguments.max_gen_len, "batch_size": 4}
        walls, processors = [], []
        for number in range(arguments.pairs):
            ended, outputs = {}, {}
            for count in (1, 2) if number % 2 == 0 else (2, 1):
                outputs[count] = Path(folder) / f"out{number}-{count}"
                task = {"count": count, "input": str(source), "output": str(outputs[count]), "options": options}
                ended[count] = run({**task, "patience": 3600}, llama)
                assert ended[count]["codes"] == [0] * count, ended[count]["stderr"]
            assert outputs[1].read_bytes() == outputs[2].read_bytes()
            rates = [arguments.records / ended[count]["seconds"] for count in (1, 2)]
            walls.append(rates[1] / rates[0])
            processors.append(ended[1]["processor_seconds"][0] / max(ended[2]["processor_seconds"]))
            print(
                f"one {rates[0]:.2f}, two {rates[1]:.2f} records per second: {walls[-1]:.2f} x; "
                f"by the busier process's processor time {processors[-1]:.2f} x",
                flush=True,
            )
    print(f"median {statistics.median(walls):.2f} x, by processor time {statistics.median(processors):.2f} x")


if __name__ == "__main__":
    main()
