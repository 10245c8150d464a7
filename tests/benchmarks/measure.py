"""Two ways of doing the same work, measured in turn in one process, as ratios.

A shared machine drifts by more than most differences worth knowing. A pair is measured within moments, and its ratio
keeps what the drift does to both; the median of many such ratios is what a row reports, with their quartiles.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK_SECONDS = 0.02  # quick functions are repeated until one measurement takes so long


class Effort(NamedTuple):
    """How long one comparison may take: so many pairs, or so many seconds, but never fewer than `LEAST` pairs."""

    pairs: int
    seconds: float


LEAST = 3


class Line(NamedTuple):
    """One line of the table."""

    what: str
    against: str
    at_most: float | None  # the target; None where there is none
    median: float
    low: float | None = None  # first quartile
    high: float | None = None  # third quartile
    note: str = ""


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], effort: Effort) -> list[float]:
    """Ratios of times, ours over theirs. Which comes first changes from pair to pair."""
    calls = [max(1, round(BLOCK_SECONDS / max(seconds(run, 1), 1e-6))) for run in (ours, theirs)]
    began, ratios = time.perf_counter(), []
    for pair in range(effort.pairs):
        if pair >= LEAST and time.perf_counter() - began > effort.seconds:
            break
        if pair % 2:
            mine, other = seconds(ours, calls[0]), seconds(theirs, calls[1])
        else:
            other, mine = seconds(theirs, calls[1]), seconds(ours, calls[0])
        ratios.append(mine / other)
    return ratios


def seconds(run: Callable[[], Any], calls: int = 1) -> float:
    """Seconds per call."""
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - began) / calls


def line(what: str, against: str, at_most: float | None, ratios: Sequence[float], note: str = "") -> Line:
    """Ratios as a line of the table."""
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Line(what, against, at_most, statistics.median(ratios), low, high, note or f"{len(ratios)} pairs")


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that tensors made by `run` held at once, as torch's CPU allocator was asked for it.

    Unlike the process' peak it does not depend on what the allocator had kept from before, nor on page sizes.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # in order of time once sorted
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


class Waits(TorchDispatchMode):
    """Counts operations, and among them those that make the host wait for the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations += 1
        # A value made on the host and a boolean index wait as well: the one for its copy, the other for its size.
        indexed = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in _flat(args[1:])
        )
        if name in self.NAMES or name == "lift_fresh" or indexed:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def _flat(values: Any) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
