"""Settings and limits per row, in either schedule."""

import pytest
import torch

from tests.generation.helpers import BOS, LONG, RAGGED, SHORT, close

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_settings_per_row_equal_rows_alone(tiny_model, schedule):
    """Temperature, top_p and max_gen_len per row, greedy and sampled rows in one batch."""
    prompts = [*RAGGED, LONG[:4]]
    temperatures, ps, lens = [0.6, 0, 1.3, 1e-45], [0.9, 0.1, 0.99, 1], [4, 9, 0, 7]
    out = tiny_model.generate(
        prompts,
        temperature=temperatures,
        top_p=ps,
        max_gen_len=lens,
        seeds=1,
        schedule=schedule,
        eos_token_id=[],
        logprobs=True,
    )
    assert [len(row) for row in out.tokens] == lens
    for row in range(4):
        alone = tiny_model.generate(
            [prompts[row]],
            temperature=temperatures[row],
            top_p=ps[row],
            max_gen_len=lens[row],
            seeds=1 + row,
            eos_token_id=[],
            logprobs=True,
        )
        assert alone.tokens[0] == out.tokens[row]
        close(alone.logprobs, out.logprobs[row : row + 1])
        close(alone.sampled_logprobs, out.sampled_logprobs[row : row + 1])
    assert out.settings["max_gen_len"] == lens


def test_settings_per_row_on_metas_stream(tiny_model):
    """Both schedules agree, and rows that share settings with a uniform call agree with it."""
    asked = {"temperature": [0.6, 0, 0.6], "top_p": [0.9, 0.9, 0.9], "max_gen_len": [7, 7, 3]}
    runs = []
    for schedule in ("reference", "padded"):
        torch.manual_seed(2)
        runs.append(tiny_model.generate(RAGGED, schedule=schedule, eos_token_id=[], **asked).tokens)
    assert runs[0] == runs[1]
    torch.manual_seed(2)
    uniform = tiny_model.generate(RAGGED, max_gen_len=7, eos_token_id=[]).tokens
    assert runs[0][0] == uniform[0]
    assert runs[0][2] == uniform[2][:3]
    assert runs[0][1] == tiny_model.generate([LONG], max_gen_len=7, temperature=0, eos_token_id=[]).tokens[0]


@pytest.mark.parametrize("schedule", ["reference", "padded", "auto"])
def test_max_seq_len_binds_each_row(tiny_model, schedule):
    """A row ends at the total length, a shorter one may go on to its own max_gen_len: Meta's limit is per row."""
    asked = {"max_gen_len": 5, "max_seq_len": 9, "seeds": 2, "eos_token_id": [], "schedule": schedule}
    out = tiny_model.generate(RAGGED, **asked)
    assert [len(row) for row in out.tokens] == [5, 2, 5]
    assert out.finish_reason == ["length"] * 3
    for row in range(3):
        alone = tiny_model.generate([RAGGED[row]], max_gen_len=5, max_seq_len=9, seeds=2 + row, eos_token_id=[])
        assert alone.tokens[0] == out.tokens[row]
    full = tiny_model.generate(RAGGED, max_gen_len=5, max_seq_len=7, seeds=2, eos_token_id=[], schedule=schedule)
    assert [len(row) for row in full.tokens] == [4, 0, 5]


def test_the_models_context_binds(tiny_model):
    """Without max_seq_len it is the limit; auto leaves padded where a padded batch would outgrow it."""
    long = [[BOS] * 508, SHORT]
    out = tiny_model.generate(long, max_gen_len=8, seeds=1, eos_token_id=[])
    assert [len(row) for row in out.tokens] == [4, 8]
    assert out.settings["schedule"] == "reference"
    assert out.tokens[1] == tiny_model.generate([SHORT], max_gen_len=8, seeds=2, eos_token_id=[]).tokens[0]
    with pytest.raises(ValueError, match=r"padded.*context of 512"):
        tiny_model.generate(long, max_gen_len=8, schedule="padded")


def test_max_time_ends_a_run(tiny_model):
    """A run that is out of time gives what it has; in ragged reference prompts might be cut, so it is refused."""
    prompts = [SHORT, [BOS, *range(20, 120)]]
    asked = {"max_gen_len": 40, "seeds": 1, "max_time": 1e-9, "echo": True, "logprobs": True, "eos_token_id": []}
    out = tiny_model.generate(prompts, **asked)
    for row, scores, prompt in zip(out.tokens, out.logprobs, prompts, strict=True):
        assert row[: len(prompt)] == prompt
        assert len(scores) == len(row) == len(prompt) + 1
    with pytest.raises(ValueError, match="max_time"):
        tiny_model.generate(prompts, schedule="reference", **asked)
