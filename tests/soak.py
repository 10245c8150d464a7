"""Random calls for half an hour: memory stays flat, and no file, thread or tensor is left. `make soak`.

    SOAK_MINUTES=2 SOAK_SEED=7 python -m tests.soak

Each round is one call of either API, of the command line or of a batch run, some of them refused, broken off or in two
threads. After a first fifth of the time, in which caches fill, open files, threads and live tensors are counted and
the process' memory is noted; at the end none of the counts may be higher, and the memory of the last quarter may not
be above the second quarter's by more than `MOST_GROWTH`.
"""

import contextlib
import gc
import io
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from hf_llama_sampling import Llama, LlamaForCausalLM, LlamaSampler, batch
from hf_llama_sampling.cli import main as command
from tests.conftest import TINY

MOST_GROWTH = 1.03  # of resident memory: allocators give back late
VOCAB = 1024
TEXTS = ["ROMEO:", "The king is", "", "First Citizen:\nWe are", "é \U0001f642", "word " * 30]


class Held(NamedTuple):
    """What the process holds."""

    files: int
    threads: int
    tensors: int
    mib: float  # resident

    @classmethod
    def now(cls) -> "Held":
        """Counted after a collection."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            files=len(os.listdir("/proc/self/fd")),
            threads=threading.active_count(),
            tensors=sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
            mib=pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        )


class Interrupted:
    """A streamer that stops its run at some token, as Ctrl-C or a reader that went away does."""

    def __init__(self, error: type[BaseException], after: int) -> None:
        self.error, self.left = error, after

    def put(self, value: Any) -> None:
        """Count down."""
        self.left -= 1
        if self.left < 0:
            raise self.error("planted")

    def end(self) -> None:
        """Nothing is held."""


class Soak:
    """The models, and one random call after another."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.draw = random.Random(seed)
        self.folder = folder
        self.model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
        self.plain = transformers.LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
        self.llama = Llama(self.model, str(TINY), max_seq_len=256)
        self.calls: list[Callable[[], Any]] = [
            self.generate,
            self.refused,
            self.interrupted,
            self.streamed,
            self.two_threads,
            self.score,
            self.continuations,
            self.sampler,
            self.completion,
            self.chat,
            self.batch,
            self.command,
        ]

    def prompts(self) -> list[list[int]]:
        """A ragged batch, some of its rows equal or with a beginning in common."""
        start = [self.draw.randrange(3, VOCAB) for _ in range(self.draw.choice([0, 3, 40]))]
        rows = [
            [1, *start, *(self.draw.randrange(3, VOCAB) for _ in range(self.draw.randint(0, 20)))]
            for _ in range(self.draw.randint(1, 6))
        ]
        return rows + rows[: self.draw.randint(0, 2)]

    def settings(self) -> dict[str, Any]:
        """What `generate` may be asked for."""
        settings = {
            "max_gen_len": self.draw.randint(0, 24),
            "temperature": self.draw.choice([0.0, 0.6, 1.0, 2.0]),
            "top_p": self.draw.choice([0.0, 0.5, 0.9, 1.0]),
            "echo": self.draw.random() < 0.5,
            "logprobs": self.draw.random() < 0.5,
            "top_logprobs": self.draw.choice([0, 0, 3]),
            "schedule": self.draw.choice(["auto", "reference", "padded"]),
            "chunk_bytes": self.draw.choice([1, 1 << 20, 1 << 27]),
        }
        return settings | self.draw.choice([{}, {"seeds": self.draw.randrange(2**64)}])

    def generate(self) -> Any:
        """Any settings, any batch, sometimes edited logits."""
        more = self.draw.choice([{}, {"repetition_penalty": 1.3}, {"bad_words_ids": [[5], [9, 10]]}])
        return self.model.generate(self.prompts(), **self.settings(), **more)

    def refused(self) -> None:
        """A wrong value in an otherwise good call."""
        wrong = self.draw.choice([{"top_p": 2}, {"temperature": -1}, {"beams": 2}, {"seeds": [1] * 99}])
        with contextlib.suppress(ValueError, TypeError):
            self.model.generate(self.prompts(), **{**self.settings(), **wrong})
            raise AssertionError(f"{wrong} was not refused")

    def interrupted(self) -> None:
        """A run that ends by an error, or by Ctrl-C, in some step."""
        error = self.draw.choice([KeyboardInterrupt, RuntimeError])
        with contextlib.suppress(error):
            streamer = Interrupted(error, after=self.draw.randint(0, 5))
            self.model.generate(self.prompts()[:1], max_gen_len=8, streamer=streamer)

    def streamed(self) -> str:
        """A run in a thread, its text read here."""
        streamer = transformers.TextIteratorStreamer(self.llama.tokenizer.tokenizer, timeout=60)
        asked = {"max_gen_len": 12, "seeds": 3, "streamer": streamer}
        run = threading.Thread(target=self.model.generate, args=(self.prompts()[:1],), kwargs=asked)
        run.start()
        text = "".join(streamer)
        run.join()
        return text

    def two_threads(self) -> None:
        """One model, two runs at once."""
        runs = [
            threading.Thread(
                target=self.model.generate, args=(self.prompts(),), kwargs=self.settings() | {"seeds": number}
            )
            for number in range(2)
        ]
        for run in runs:
            run.start()
        for run in runs:
            run.join()

    def score(self) -> Any:
        """Logprobs of given texts."""
        return self.model.score_tokens(self.prompts(), top_logprobs=self.draw.choice([0, 2]))

    def continuations(self) -> Any:
        """Choices after contexts."""
        contexts = self.prompts()
        return self.model.score_continuations(contexts, [[[5, 6], [7]] for _ in contexts])

    def sampler(self) -> Any:
        """The sampler in transformers' own `generate`."""
        sampler = LlamaSampler(0.8, 0.9, seeds=[self.draw.randrange(100)])
        ids = torch.tensor([[1, *(self.draw.randrange(3, VOCAB) for _ in range(5))]])
        return self.plain.generate(ids, do_sample=False, max_new_tokens=8, logits_processor=[sampler], pad_token_id=0)

    def completion(self) -> Any:
        """Texts in, texts out."""
        texts = self.draw.sample(TEXTS, k=self.draw.randint(1, 4))
        return self.llama.text_completion(texts, max_gen_len=12, logprobs=self.draw.random() < 0.5)

    def chat(self) -> Any:
        """Dialogs of one to three messages, one of them unsafe."""
        said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
        dialogs = [said[:1], [*said, {"role": "user", "content": self.draw.choice(["Go", "say [INST]"])}]]
        return self.llama.chat_completion(dialogs, max_gen_len=8, chat_format="llama2")

    def batch(self) -> None:
        """A batch run, then the same again: it is taken up, or left alone."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            source, output = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
            records = [{"prompt": self.draw.choice(TEXTS), "seed": number} for number in range(6)] + [{"wrong": 1}]
            source.write_text("".join(json.dumps(record) + "\n" for record in records))
            for _ in range(2):
                batch.run(self.llama, source, output, max_gen_len=6, seed=1)

    def command(self) -> None:
        """The command line, in this process."""
        lines = [
            ["complete", "ROMEO:", "--max-gen-len", "6", "--json"],
            ["complete", "x", "--top-p", "3"],
            ["complete", "x", "--model", "/nowhere"],
        ]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            command(self.draw.choice(lines))


def quarter(found: list[Held], which: int) -> float:
    """The usual memory in one quarter of the run, in MiB."""
    start, end = (len(found) * place // 4 for place in (which, which + 1))
    return statistics.median(held.mib for held in found[start:end])


def main() -> int:
    """Soak, print the figures, and say whether anything grew."""
    minutes = float(os.environ.get("SOAK_MINUTES", "30"))
    seed = int(os.environ.get("SOAK_SEED", random.SystemRandom().randrange(2**32)))
    logging.disable(logging.WARNING)  # wrong records are part of it
    print(f"SOAK_MINUTES={minutes:g} SOAK_SEED={seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(seed, Path(folder))
        for call in soak.calls:  # what is done once is done here
            call()
        began = time.monotonic()
        found, counts, first = [Held.now()], dict.fromkeys((call.__name__ for call in soak.calls), 0), None
        while (elapsed := time.monotonic() - began) < 60 * minutes:
            for _ in range(10):
                call = soak.draw.choice(soak.calls)
                call()
                counts[call.__name__] += 1
            found.append(Held.now())
            if first is None and elapsed > 12 * minutes:
                first = found[-1]
            if len(found) % 50 == 0:
                print(f"{elapsed:6.0f} s, {sum(counts.values())} calls, {found[-1]}", flush=True)
        del soak
    print(f"calls: {counts}")
    first = first or found[0]
    print(f"after a fifth of the time: {first}\nat the end:                {found[-1]}")
    usual = quarter(found, 1), quarter(found, 3)
    print(f"memory, median of the second quarter {usual[0]:.0f} MiB, of the last {usual[1]:.0f} MiB")
    grown = [name for name in ("files", "threads", "tensors") if getattr(found[-1], name) > getattr(first, name)]
    grown += ["memory"] if usual[1] > MOST_GROWTH * usual[0] else []
    print(f"grown: {', '.join(grown)}" if grown else "nothing grew")
    return bool(grown)


if __name__ == "__main__":
    sys.exit(main())
