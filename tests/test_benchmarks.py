"""The benchmark command runs, every row of it. What it measures is nobody's assertion, what it counts is."""

import math
import sys

import pytest
import torch
import transformers

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import continuous, loops, memory, sharing
from tests.benchmarks.measure import Effort, Waits, line, peak_bytes
from tests.bounds import ROUNDING
from tests.conftest import TINY
from tests.generation.batching import without_collections

pytestmark = pytest.mark.slow

SMALL = benchmarks.QUICK._replace(
    vocabularies=(500,),
    cases=[(8, 6)],
    new=3,
    ragged=loops.Ragged(rows=3, longest=20, new=2),
    lengths=(8, 32),
    steps=2,
    held=memory.Batch(rows=2, prompt=40, new=4),
    look_ahead=[18],
    score=[(2, 9)],
    samples=sharing.Header(header=40, own=0, rows=2, new=2),
    header=sharing.Header(header=40, own=5, rows=2, new=2),
    choices=[(sharing.Choices(40, 2, 5, 2, 2), 0.1), (sharing.Choices(0, 2, 5, 2, 1), 0.3)],
    chat=loops.Chat(turn=3, tokens=20),
    echoed=[(1, 12)],
    sampled=3,
    budgets=[100],
    requests=[(continuous.Requests(count=4, shortest=4, longest=9, fewest=1, most=4, rows=2), 0.75)],
    plotted=([8, 16], [50, 500]),
    shared=([1, 2], [0, 40]),
)
EFFORT = Effort(pairs=2, seconds=0)
# Section 11 of the design, by row.
TARGETS = {
    "draw-seeds": {0.2},
    "draw-meta": {0.5},
    "flat-seeds": {1.1},
    "flat-meta": {1.1},
    "logprobs": {1.08, None},  # 0.6 in one case
    "forwards": {None},
    "ragged-seeds": {1.0, None},
    "ragged-meta": {0.25},
    "memory": {0.1},
    "memory-4x": {4.0},
    "length": {1.02},
    "waits": {1.0},
    "look-ahead": {None},
    "score": {None},
    "samples": {0.45},
    "header": {0.55},
    "continuous": {0.75},
    "choices": {0.1, 0.3},
    "chat": {0.25},
    "one-token": {1.1},
    "overhead": {1.0, 0.9},
    "operations": {30.0, 20.0},
    "samples-memory": {1.0},
    "tree-memory": {1.0},
    "score-memory": {None},
}


@pytest.fixture(scope="module")
def models():
    """The bundled model, where the table has the 135M weights."""
    model = transformers.LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    return loops.Models.of(model, list(range(3, 203)))


@pytest.mark.parametrize("name", TARGETS)
def test_every_row_is_measured(models, monkeypatch, name):
    """Each line has a ratio of its own and section 11's target; smaller sizes have no target that depends on size."""
    if name == "continuous":
        without_collections(monkeypatch)
    small = benchmarks.rows(lambda: models, EFFORT, SMALL)
    assert list(small) == list(TARGETS)
    sized = ("logprobs", "ragged", "memory", "length", "samples", "header", "continuous", "choices", "chat", "one")
    if name.startswith(sized):
        assert {line.at_most for line in small[name]()} == {None}
    monkeypatch.setattr(benchmarks, "FULL", SMALL)
    lines = list(benchmarks.rows(lambda: models, EFFORT, SMALL)[name]())
    assert {line.at_most for line in lines} == TARGETS[name]
    assert len({(line.what, line.against) for line in lines}) == len(lines)
    assert all(math.isfinite(line.median) and line.median > 0 for line in lines)


def test_forwards_are_a_part_of_the_run(models):
    """Their share is below one, and the hooks that measured it are gone."""
    (share,) = benchmarks.rows(lambda: models, EFFORT, SMALL)["forwards"]()
    assert 0 < share.median < 1
    assert not models.ours._forward_hooks and not models.ours._forward_pre_hooks


def test_section_11s_sizes():
    """The full table measures the very cases that the design names."""
    full = benchmarks.FULL
    assert set(full.cases) == {(1, 16), (1, 256), (8, 16), (8, 256)} and full.new == 64
    assert full.ragged == (8, 400, 32, 16) and sorted(full.ragged.lengths())[:: len(full.ragged.lengths()) - 1] == [
        16,
        400,
    ]
    assert full.held == (8, 512, 256) and full.lengths == (256, 2048) and set(full.vocabularies) == {32_000, 128_256}
    assert full.look_ahead[0] == 16 and full.look_ahead[-1] == 2000
    assert full.chat == (10, 60) and full.echoed == [(1, 256), (8, 256)] and full.sampled == 100


def test_a_line_is_the_median_of_paired_ratios():
    """Not the ratio of medians: what drifts drifts in both of a pair."""
    measured = line("", "", None, ours=[1.0, 8.0, 3.0], theirs=[2.0, 8.0, 12.0])
    assert (measured.low, measured.median, measured.high) == (0.375, 0.5, 0.75)


def test_the_fastest_runs_decide():
    """A target is compared with their ratio where there is one, with a single pair too; a count is what it is."""
    measured = line("", "", 0.5, ours=[1.0, 8.0, 3.0], theirs=[2.0, 4.0, 3.0])
    assert measured.median == 1.0 and measured.fastest == 0.5 and not measured.missed
    single = line("", "", 0.5, ours=[3.0], theirs=[2.0])
    assert (single.low, single.median, single.high, single.fastest) == (1.5, 1.5, 1.5, 1.5) and single.missed
    assert single.note == "3.00 s against 2.00 s, 1 pair"
    assert single._replace(fastest=None, median=0.4).missed is False


def test_the_table(capsys, monkeypatch):
    """The command prints the machine and a Markdown table, and marks what is above its target."""
    monkeypatch.setattr("sys.argv", ["benchmarks", "--quick", "--rows", "waits"])
    threads = torch.get_num_threads()
    benchmarks.main()
    torch.set_num_threads(threads)
    text = capsys.readouterr().out
    table = [row.split(" | ") for row in text.splitlines() if row.startswith("| waits")]
    assert f"torch {torch.__version__}" in text and "--rows waits" in text
    # With padding transformers asks its mask in each step as well, so both have two there; nothing is added here.
    assert [row[3] for row in table] == ["1.000", "1.000", "**2.000**", "**2.000**"]
    assert [row[5].split(" of them")[0] for row in table] == ["1", "1", "2", "2"]


def test_what_is_not_installed_is_named(monkeypatch):
    """Without the test extra the command says what to install, in one sentence."""
    monkeypatch.setitem(sys.modules, "tests.conftest", None)
    with pytest.raises(SystemExit, match=r"tests.conftest, of the extra .*make benchmarks"):
        benchmarks.load(None)


def test_the_plots(models, tmp_path):
    """Pictures of cost against length and vocabulary, and against choices and a header's length."""
    costs, shared = tmp_path / "costs.png", tmp_path / "sharing.png"
    benchmarks.draw_costs(costs, shared, models, EFFORT, SMALL)
    assert costs.read_bytes().startswith(b"\x89PNG") and shared.read_bytes().startswith(b"\x89PNG")


def test_what_is_compared_does_the_same_work(models):
    """transformers' recipe gives a prompt's logprobs as ours does; the plain scores are score_tokens'."""
    prompts = models.prompts([12, 12])
    made, scores = loops.transformers_recipe(models.theirs, torch.tensor(prompts), 4)
    ours = loops.ours_with_logprobs(models, prompts, 4)
    assert made.shape == (2, 4) and scores.shape == (2, 15)
    for row in range(2):
        assert scores[row, :11].tolist() == pytest.approx(ours.logprobs[row][1:12], abs=ROUNDING)
    plain = loops.plain_scores(models.theirs, prompts)
    for row, scored in enumerate(models.ours.score_tokens(prompts).logprobs):
        assert scored[1:] == pytest.approx(plain[row], abs=ROUNDING)


def test_extra_memory_of_logprobs():
    """Far below transformers' recipe, and at four times the length at most four times as much."""
    models = memory.wide_models(1024)
    batch = memory.Batch(rows=4, prompt=448, new=4)
    (against_recipe,) = memory.logprobs_and_echo(models, batch)
    assert against_recipe.median < 0.4
    (fourfold,) = memory.four_times_the_length(models, batch._replace(prompt=56))
    assert 1 < fourfold.median <= 4.1  # the chunk's budget is not reached before


def test_peak_bytes_counts_what_is_held_at_once():
    """Two tensors at a time of three: 2 MiB, whatever was freed before."""

    def run():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        return torch.empty(1 << 20, dtype=torch.uint8), torch.empty(1 << 20, dtype=torch.uint8)

    assert peak_bytes(run) == 2 << 20


@pytest.mark.parametrize(
    "look",
    [
        lambda t: t[0].item(),
        lambda t: bool(t.any()),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: torch.tensor([1, 2]),
    ],
)
def test_waits_are_noticed(look):
    """Each way in which a host waits for its device is counted, and an ordinary operation is not."""
    values = torch.ones(1)
    with Waits() as ordinary:
        values + values
    assert not ordinary.waits and ordinary.operations == 1
    with Waits() as counted:
        look(values)
    assert counted.waits
