"""What belongs to the caller sees each row's own text: no padding, no half prompt, nothing of rows that are over."""

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria

from tests.model_based.calls import LETTERS, letters
from tests.model_based.rule import VOCAB, tiny

pytestmark = pytest.mark.slow

PROMPTS = [[1, 5, 6], [1, 7, 8, 9, 10, 11], [1, 12], [1, 13, 14]]
LIMITS = [5, 2, 6, 0]
EOS = [2, 3, 21, 30]
CASES = [
    pytest.param(schedule, copies, draw, id=f"{schedule}-{copies}-{draw}")
    for schedule in ("reference", "padded")
    for copies in (1, 2)
    for draw in ("seeds", "greedy", "meta")
]


def run(schedule: str, copies: int, draw: str, **asked: Any) -> list[list[int]]:
    """Complete the prompts under limits of their own; returns each row's text with its EOS."""
    streams = {
        "seeds": {"seeds": 5},
        "greedy": {"temperature": 0},
        "meta": {"generator": torch.Generator().manual_seed(5)},
    }
    asked = {"max_gen_len": LIMITS, "eos_token_id": EOS, "pad_token_id": 0} | streams[draw] | asked
    out = tiny().generate(PROMPTS, schedule=schedule, num_return_sequences=copies, **asked)
    longest = max(map(len, PROMPTS))
    texts = []
    for row, sequence in enumerate(out.sequences.tolist()):
        end = longest + len(out.tokens[row])
        end += sequence[end : end + 1] != [] and sequence[end] in EOS
        texts.append(sequence[longest - len(PROMPTS[row // copies]) : end])
    return texts


def beginnings(text: list[int], prompt: list[int]) -> list[list[int]]:
    """The text before each of its new tokens."""
    return [text[:length] for length in range(len(prompt), len(text))]


class Looks(LogitsProcessor):
    """Notes the rows that it is shown."""

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: (B, T); scores: (B, V)."""
        assert len(input_ids) == len(scores)
        self.seen.append(input_ids.tolist())
        return scores


class LooksToo(StoppingCriteria):
    """Notes the rows that it is shown, and ends none."""

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """input_ids: (B, T)."""
        self.seen.append(input_ids.tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(("schedule", "copies", "draw"), CASES)
def test_prefix_allowed_tokens_fn_is_asked_once_per_new_token(schedule, copies, draw):
    """With the row's number and its own text, for no token that is forced, done or beyond the limit."""
    asked: list[tuple[int, list[int]]] = []

    def allowed(number: int, text: torch.Tensor) -> list[int]:
        asked.append((number, text.tolist()))
        return list(range(VOCAB))

    texts = run(schedule, copies, draw, prefix_allowed_tokens_fn=allowed)
    expected = [
        (row, beginning) for row, text in enumerate(texts) for beginning in beginnings(text, PROMPTS[row // copies])
    ]
    assert sorted(asked) == sorted(expected)


@pytest.mark.parametrize(("schedule", "copies", "draw"), CASES)
def test_an_answer_of_eos_ends_its_row_alone(schedule, copies, draw):
    """A function that allows EOS alone to one row ends that row, and changes no other."""

    def allowed(number: int, text: torch.Tensor) -> list[int]:
        return [2] if number == 2 * copies and len(text) > 3 else list(range(VOCAB))

    plain = run(schedule, copies, draw)
    ended = run(schedule, copies, draw, prefix_allowed_tokens_fn=allowed)
    for row, text in enumerate(plain):
        if row == 2 * copies and len(text) > 4:
            assert ended[row] == [*text[:4], 2]
        else:
            assert ended[row] == text


@pytest.mark.parametrize(("schedule", "copies", "draw"), CASES)
def test_processors_see_own_texts(schedule, copies, draw):
    """Every row that a processor is shown is some row's text before a new token, and each such text is shown."""
    looks = Looks()
    texts = run(schedule, copies, draw, logits_processor=[looks])
    wanted = [tuple(b) for row, text in enumerate(texts) for b in beginnings(text, PROMPTS[row // copies])]
    shown = {tuple(text) for batch in looks.seen for text in batch}
    assert shown == set(wanted)


@pytest.mark.parametrize(("schedule", "copies", "draw"), CASES)
def test_criteria_see_own_texts(schedule, copies, draw):
    """A criterion is shown rows' texts after a new token and nothing else, and each such text without EOS."""
    looks = LooksToo()
    texts = run(schedule, copies, draw, stopping_criteria=[looks])
    after = {
        tuple(text[:length])
        for row, text in enumerate(texts)
        for length in range(len(PROMPTS[row // copies]) + 1, len(text) + 1)
    }
    shown = {tuple(text) for batch in looks.seen for text in batch}
    assert shown <= after
    assert {text for text in after if text[-1] not in EOS} <= shown


@pytest.mark.parametrize(("schedule", "copies", "draw"), CASES)
def test_stop_strings_meet_a_rows_own_text(schedule, copies, draw):
    """A letter that ends a text of its own ends that row there, and no other: not in prompts, not in padding."""
    plain = run(schedule, copies, draw)
    for stop in {LETTERS[0], *(LETTERS[text[-1]] for text in plain)}:
        expected = []
        for row, text in enumerate(plain):
            begin = len(PROMPTS[row // copies])
            ends = [place + 1 for place in range(begin, len(text)) if LETTERS[text[place]] == stop]
            expected.append(text[: ends[0]] if ends else text)
        found = run(schedule, copies, draw, stop_strings=[stop], tokenizer=letters())
        assert [text[: len(goal)] for text, goal in zip(found, expected, strict=True)] == expected
        assert [len(text) for text in found] == [len(goal) for goal in expected]
