"""Cost against vocabulary and against length, as one picture."""

import statistics
from pathlib import Path

import matplotlib
import torch

from .draws import FLAT, PEAKED, Draws
from .loops import Models, bare_loop
from .measure import Effort, in_turn

matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot  # after the choice above


def plot(file: Path, models: Models, effort: Effort, *, quick: bool) -> None:
    """Draw both panels into `file`: milliseconds per draw over V, milliseconds per new token over the text's length."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    vocabularies = [1_000, 8_000, 32_000, 128_256] if quick else [1_000, 4_000, 16_000, 32_000, 64_000, 128_256]
    for deviation, style in ((PEAKED, "-"), (FLAT, "--")):
        columns = []
        for vocab in vocabularies:
            draws = Draws(vocab, 1, deviation)
            ways = [draws.one_stream_per_prompt, draws.metas_stream, draws.transformers, draws.reference]
            columns.append([1000 * statistics.median(times) for times in in_turn(ways, effort)])
        kind = "peaked" if deviation == PEAKED else "flat"
        for number, name in enumerate(("one stream per prompt", "Meta's stream", "transformers", "the reference")):
            costs = [column[number] for column in columns]
            left.plot(vocabularies, costs, style, color=f"C{number}", marker="o", label=f"{name}, {kind}")
    left.set(xscale="log", yscale="log", xlabel="vocabulary", ylabel="ms per draw", title="A draw, B = 1")
    left.legend(fontsize=7)

    lengths, steps = ([64, 256] if quick else [64, 256, 512, 1024, 1536]), 8
    ours, bare = [], []
    for length in lengths:
        ids = torch.tensor(models.prompts([length]))
        runs = [
            lambda ids=ids: models.ours.generate(ids.tolist(), max_gen_len=steps, seeds=0, eos_token_id=[]),
            lambda ids=ids: models.ours.generate(ids.tolist(), max_gen_len=1, seeds=0, eos_token_id=[]),
            lambda ids=ids: bare_loop(models.theirs, ids, steps, last_only=True),
            lambda ids=ids: bare_loop(models.theirs, ids, 1, last_only=True),
        ]
        whole, first, plain, plain_first = (statistics.median(times) for times in in_turn(runs, effort))
        ours.append(1000 * (whole - first) / (steps - 1))
        bare.append(1000 * (plain - plain_first) / (steps - 1))
    right.plot(lengths, ours, marker="o", label="one stream per prompt")
    right.plot(lengths, bare, marker="o", label="a bare loop of forward + argmax")
    right.set(xlabel="length of the text", ylabel="ms per new token", title="A token, 135M weights, B = 1", ylim=0)
    right.legend(fontsize=7)
    figure.savefig(file, dpi=120)
