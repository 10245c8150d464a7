"""`engine="continuous"` gives the answers of batches, and what fails there is asked again in batches."""

import json

import pytest
import torch

from hf_llama_sampling import batch
from hf_llama_sampling.batch.continuous import ContinuousEngine
from hf_llama_sampling.cli import main
from tests.batch.helpers import SETTINGS, ask_all, read, some_records, write
from tests.bounds import ROUNDING
from tests.generation.batching import without_collections

pytest.importorskip("transformers.generation.continuous_batching.cb_logits_processors")
batching = pytest.importorskip("transformers.generation.continuous_batching.continuous_api")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_collections(monkeypatch)


def same(found, expected):
    """Answers that agree in everything, logprobs within the model's rounding."""
    for mine, other in zip(found, expected, strict=True):
        assert list(mine) == list(other)
        assert {**mine, "logprobs": 0} == {**other, "logprobs": 0}
        assert mine.get("logprobs", []) == pytest.approx(other.get("logprobs", []), abs=ROUNDING)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"batch_size": 3, "batch_tokens": 100, "window": 13}])
def test_answers_are_those_of_batches(llama, tmp_path, options):
    """With many in flight and with a cache for few; wrong records, empty answers and kept fields among them."""
    records = [
        *some_records(40),
        {"prompt": "a", "top_k": 1},
        {"prompt": "b", "max_gen_len": 0},
        {"x": 1, "prompt": ""},
    ]
    asked = {"logprobs": True, "keep_fields": ["x"], "name": "batches"}
    expected = ask_all(llama, tmp_path, records, **asked)
    assert same(ask_all(llama, tmp_path, records, **{**asked, "name": "c"}, engine="continuous", **options), expected)
    assert {answer.get("finish_reason") for answer in expected} >= {"stop", "length", None}


def test_a_run_is_taken_up_by_either_engine(llama, tmp_path, monkeypatch):
    """Neither is a part of what the answers depend on: a stopped run goes on in batches, and is complete for both."""
    records = some_records(12)
    expected = ask_all(llama, tmp_path, records, name="whole")
    answer, given = ContinuousEngine.responses, []

    def stopping(self, batches):
        for responses in answer(self, batches):
            given.extend(responses)
            yield responses
            if len(given) >= 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(ContinuousEngine, "responses", stopping)
    with pytest.raises(KeyboardInterrupt):
        ask_all(llama, tmp_path, records, engine="continuous")
    monkeypatch.undo()
    summary = batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS)
    assert read(tmp_path / "out") == expected and summary.answered == 12 - len(given) < 12
    again = batch.run(llama, tmp_path / "out.in", tmp_path / "out", engine="continuous", **SETTINGS)
    assert again.answered == 0 and again.records == 12


def test_out_of_memory_goes_on_in_batches(llama, tmp_path, monkeypatch, caplog):
    """Once, and logged; the answers are the same."""
    records = some_records(12)
    expected = ask_all(llama, tmp_path, records, name="whole")
    steps = iter(range(100))
    step = batching.ContinuousBatchProcessor._generation_step

    def small(processor, model):
        if next(steps) == 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        step(processor, model)

    monkeypatch.setattr(batching.ContinuousBatchProcessor, "_generation_step", small)
    assert ask_all(llama, tmp_path, records, engine="continuous", window=6) == expected
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hf_llama_sampling")]
    assert said == ["out of memory with continuous batching: the rest is answered in batches"]


def test_another_fault_ends_the_run(llama, tmp_path):
    """As an error that names it; what was answered is kept."""
    handle = llama.model.register_forward_pre_hook(lambda module, args: 1 / 0)
    try:
        with pytest.raises(RuntimeError, match="continuous batching failed: division by zero"):
            ask_all(llama, tmp_path, some_records(3), engine="continuous")
    finally:
        handle.remove()


def test_logits_that_are_not_finite_cost_one_record(llama, tmp_path):
    """The record gets the error that it gets in batches; the others are answered."""
    records = [{"prompt_tokens": [1, 5, 6]}, {"prompt_tokens": [1, 7]}, {"prompt_tokens": [1, 5, 9]}]
    expected = ask_all(llama, tmp_path, records, name="whole")

    def plant(module, args, kwargs, output):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        kept = kwargs["logits_to_keep"]
        last = ids[:, kept] if isinstance(kept, torch.Tensor) else ids[:, -kept:]
        output.logits[..., 17].masked_fill_(last == 9, torch.nan)

    handle = llama.model.register_forward_hook(plant, with_kwargs=True)
    try:
        answers = ask_all(llama, tmp_path, records, engine="continuous")
    finally:
        handle.remove()
    assert answers[:2] == expected[:2]
    assert "logits must be finite, but those for position 3 of row 0 hold nan or inf" in answers[2]["error"]


def test_the_command(tmp_path, capsys):
    """It takes the option, and refuses by name what this engine does not give."""
    source = write(tmp_path / "in.jsonl", some_records(4))
    asked = ["--max-gen-len", "5", "--seed", "1"]
    assert main(["batch", str(source), str(tmp_path / "a"), *asked]) == 0
    assert main(["batch", str(source), str(tmp_path / "b"), *asked, "--engine", "continuous"]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for option in (
        *(["--score"], ["--prompt-logprobs"], ["--top-logprobs", "2"]),
        *(["--logprobs-of", "5"], ["--sampling-logprobs"]),
    ):
        assert main(["batch", str(source), str(tmp_path / "c"), *asked, "--engine", "continuous", *option]) == 2
        name = option[0].removeprefix("--").replace("-", "_")
        assert f'engine="continuous" gives the logprobs of new tokens alone, and {name}=' in capsys.readouterr().err


@pytest.mark.launches
def test_two_processes(llama, launch, tmp_path):
    """Each answers its share; together they are the answers of one."""
    records = some_records(24)
    expected = ask_all(llama, tmp_path, records, name="whole")
    source = write(tmp_path / "in.jsonl", records)
    launch(count=2, input=source, output=tmp_path / "out", options={**SETTINGS, "engine": "continuous", "window": 8})
    assert [json.loads(line) for line in (tmp_path / "out").read_bytes().splitlines()] == expected
