"""Faults: after any of them the model works at once, no reader waits, and threads do not mix."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria, TextIteratorStreamer

from hf_llama_sampling.generation.releases import CACHE_NAME
from tests.model_based.calls import Collector, letters
from tests.model_based.rule import tiny

pytestmark = pytest.mark.slow

PROMPTS = [[1, 5, 6], [1, 7, 8, 9, 10, 11], [1, 12]]
SCHEDULES = ["reference", "padded"]


def seeded(prompts: list[list[int]] = PROMPTS, **asked: Any) -> Any:
    """A call that answers the same whenever it is made."""
    return tiny().generate(prompts, **{"max_gen_len": 5, "seeds": 3, "logprobs": True, "echo": True} | asked)


class Broken(Exception):
    """What the caller's own code raises."""


class RaisingProcessor(LogitsProcessor):
    """Raises in its third call."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: (B, T); scores: (B, V)."""
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return scores


class RaisingCriterion(StoppingCriteria):
    """Raises in its second call."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """input_ids: (B, T)."""
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return torch.zeros(len(input_ids), dtype=torch.bool)


class RaisingStreamer(Collector):
    """Raises at its second value."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.puts = error, 0

    def put(self, value: torch.Tensor) -> None:
        """value: ids."""
        self.puts += 1
        if self.puts == 2:
            raise self.error


class RaisingTokenizer:
    """Raises when stop strings ask for its vocabulary."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def get_vocab(self) -> dict[str, int]:
        """Asked for by transformers' StopStringCriteria."""
        raise self.error


def raising_forward(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The model itself raises in its third forward."""
    calls: list[int] = []

    def broken(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error

    monkeypatch.setitem(tiny().lm_head._forward_hooks, -1, broken)
    return {}


FAULTS = {
    "processor": lambda error, _: {"logits_processor": [RaisingProcessor(error)]},
    "criterion": lambda error, _: {"stopping_criteria": [RaisingCriterion(error)]},
    "streamer": lambda error, _: {"streamer": RaisingStreamer(error)},
    "tokenizer": lambda error, _: {"stop_strings": ["ab"], "tokenizer": RaisingTokenizer(error)},
    "forward": raising_forward,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("error", [Broken("mine"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_callers_code_raises_comes_through(fault, error, schedule, monkeypatch):
    """The error itself leaves `generate`, and the next seeded call answers as before."""
    prompts = PROMPTS[:1] if fault == "streamer" else PROMPTS
    before = seeded(schedule=schedule)
    with monkeypatch.context() as patch, pytest.raises(type(error)) as raised:
        seeded(prompts, schedule=schedule, **FAULTS[fault](error, patch))
    assert raised.value is error
    after = seeded(schedule=schedule)
    assert (after.tokens, after.logprobs) == (before.tokens, before.logprobs)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("row", "position"), [(0, 3), (0, 5), (1, 6), (1, 8), (2, 4)])
def test_nan_is_named_by_row_and_position(schedule, value, row, position, monkeypatch):
    """Bad logits of one row and step are refused by that row and position, and leave nothing behind."""
    before = seeded(schedule=schedule, eos_token_id=39, temperature=0, max_gen_len=5)
    text = before.tokens[row]
    if len(text) <= position:
        pytest.skip("the row ends before")
    columns: list[int] = []  # of the row's own, after each forward

    def note(module: Any, args: Any, kwargs: Any) -> None:
        cache, mask = kwargs.get(CACHE_NAME), kwargs.get("attention_mask")
        ids = kwargs["input_ids"]
        pads = 0 if mask is None or len(mask) <= row else int((mask[row] == 0).sum())
        columns.append(ids.shape[1] + (0 if cache is None else cache.get_seq_length()) - pads)

    def break_logits(module: Any, args: Any, logits: torch.Tensor) -> None:
        if len(logits) > row and columns[-1] == position:
            logits[row, -1, 4] = value

    with contextlib.ExitStack() as stack:
        stack.callback(tiny().register_forward_pre_hook(note, with_kwargs=True).remove)
        stack.callback(tiny().lm_head.register_forward_hook(break_logits).remove)
        with pytest.raises(ValueError, match=rf"position {position} of row {row} hold nan or inf"):
            seeded(schedule=schedule, eos_token_id=39, temperature=0, max_gen_len=5)
    after = seeded(schedule=schedule, eos_token_id=39, temperature=0, max_gen_len=5)
    assert (after.tokens, after.logprobs) == (before.tokens, before.logprobs)


REFUSED: dict[str, Callable[[], dict[str, Any]]] = {
    "a negative temperature": lambda: {"temperature": -1},
    "an option without a place": lambda: {"top_k": 5},
    "an unknown keyword": lambda: {"temprature": 1},
    "no limit": lambda: {"max_gen_len": None},
    "a prompt beyond the limit": lambda: {"max_seq_len": 2},
    "a processor that raises": lambda: {"logits_processor": [RaisingProcessor(Broken())]},
    "a processor that is interrupted": lambda: {"logits_processor": [RaisingProcessor(KeyboardInterrupt())]},
    "an id outside the vocabulary": lambda: {"eos_token_id": 4000},
}


# Remove the mark with the mend: it is strict.
@pytest.mark.parametrize("wrong", REFUSED)
def test_a_streamers_reader_is_never_left_waiting(wrong):
    """Whatever is wrong with a call, and whenever it is seen, the text of a `TextIteratorStreamer` ends."""
    streamer, waiting = TextIteratorStreamer(letters()), []
    with pytest.raises((ValueError, TypeError, Broken, KeyboardInterrupt)):
        tiny().generate([[1, 5, 6]], **{"max_gen_len": 5, "seeds": 3, "streamer": streamer} | REFUSED[wrong]())
    while not streamer.text_queue.empty():
        waiting.append(streamer.text_queue.get_nowait())
    assert waiting.count(streamer.stop_signal) == 1
    assert waiting[-1] == streamer.stop_signal


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stream", ["seeds", "generator"])
def test_threads_equal_one_after_the_other(stream, schedule):
    """Two threads on one model, with seeds or generators of their own, get what they get alone."""

    def ask(number: int) -> Any:
        own = {"seeds": number} if stream == "seeds" else {"generator": torch.Generator().manual_seed(number)}
        out = tiny().generate(PROMPTS, max_gen_len=8, schedule=schedule, logprobs=True, echo=True, **own)
        return out.tokens, out.logprobs

    numbers = range(6)
    expected = [ask(number) for number in numbers]
    start, found = threading.Barrier(2), {}

    def work(own: list[int]) -> None:
        start.wait()
        for number in own:
            found[number] = ask(number)

    threads = [threading.Thread(target=work, args=(list(numbers)[part::2],)) for part in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in numbers] == expected
