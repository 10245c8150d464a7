"""Ways of doing the same work, measured in turn in one process, as ratios.

A shared machine drifts by more than most differences worth knowing. What is measured within moments shares the drift,
so a ratio keeps little of it: a line reports the median of many ratios, with their quartiles. Machines that take memory
back from programs that pause are slow at random, and never fast at random: so the ratio of the fastest runs is what a
target is compared with.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK_SECONDS = 0.02  # quick functions are repeated until one measurement takes so long


class Effort(NamedTuple):
    """How long one comparison may take: so many pairs, or so many seconds, but never fewer than `least` pairs."""

    pairs: int
    seconds: float
    least: int = 2
    clock: Callable[[], float] = time.perf_counter


class Line(NamedTuple):
    """One line of the table."""

    what: str
    against: str
    at_most: float | None  # the target; None where there is none
    median: float
    low: float | None = None  # first quartile
    high: float | None = None  # third quartile
    note: str = ""
    fastest: float | None = None  # the ratio of the fastest runs; None for what is no time

    @property
    def missed(self) -> bool:
        """Whether the figure that decides is above the target."""
        decides = self.median if self.fastest is None else self.fastest
        return self.at_most is not None and decides > self.at_most


def in_turn(runs: Sequence[Callable[[], Any]], effort: Effort) -> list[list[float]]:
    """Seconds per call of each run, round after round. Each round starts with another run."""
    calls = [_calls(run) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    began = time.perf_counter()
    for turn in range(effort.pairs):
        if turn >= effort.least and time.perf_counter() - began > effort.seconds:
            break
        for place in range(len(runs)):
            which = (place + turn) % len(runs)
            times[which].append(seconds(runs[which], effort.clock, calls[which]))
    return times


def _calls(run: Callable[[], Any]) -> int:
    """How many calls fill `BLOCK_SECONDS`, told by the second one: the first is cold."""
    took = seconds(run, time.perf_counter)
    if took < BLOCK_SECONDS:
        took = seconds(run, time.perf_counter)
    return max(1, round(BLOCK_SECONDS / took))


def seconds(run: Callable[[], Any], clock: Callable[[], float], calls: int = 1) -> float:
    """Seconds per call."""
    began = clock()
    for _ in range(calls):
        run()
    return (clock() - began) / calls


def line(what: str, against: str, at_most: float | None, ours: Sequence[float], theirs: Sequence[float]) -> Line:
    """Times measured in turn as a line of the table."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    note = f"{_readable(statistics.median(ours))} against {_readable(statistics.median(theirs))}, {_count(len(ratios))}"
    return Line(what, against, at_most, statistics.median(ratios), low, high, note, min(ours) / min(theirs))


def _count(pairs: int) -> str:
    return f"{pairs} pair{'s' if pairs > 1 else ''}"


def _readable(duration: float) -> str:
    return f"{duration:.2f} s" if duration >= 1 else f"{duration * 1e3:.3g} ms"


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that tensors made by `run` held at once, as torch's CPU allocator was asked for it.

    Unlike the process' own peak it depends neither on what the allocator kept from before nor on the size of pages.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    now = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += change
        peak = max(peak, now)
    return peak


class Waits(TorchDispatchMode):
    """Counts operations, and collects those that would make the host wait for a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "bincount")
    UNSEEN = ("tolist", "numpy", "cpu")  # of a tensor on the CPU they dispatch nothing

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.waits: list[str] = []
        self.patches = contextlib.ExitStack()

    def __enter__(self) -> "Waits":
        for name in self.UNSEEN:
            self.patches.enter_context(mock.patch.object(torch.Tensor, name, self._noted(name)))
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()

    def _noted(self, name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.waits.append(name)
            return original(tensor, *args, **kwargs)

        return method

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations += 1
        # Values made on the host are copied and waited for; a boolean index is counted first.
        boolean = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if len(args) > 1 else ())
        )
        if name in self.NAMES or name == "lift_fresh" or boolean:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))
