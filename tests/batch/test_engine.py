"""Batches through the model: halved where memory or a row asks for it, stopped by everything else."""

import pytest
import torch
import transformers

from hf_llama_sampling import Llama, LlamaForCausalLM
from tests.batch.helpers import ask_all, some_records
from tests.bounds import ROUNDING
from tests.conftest import TINY

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA out of memory. Tried"), MemoryError()],
)
def test_out_of_memory_halves_the_batch(llama, tmp_path, monkeypatch, caplog, error):
    """Down to what fits, logged, and not tried again at the size that did not; the answers are the same."""
    records = some_records(24)
    expected = ask_all(llama, tmp_path, records)
    generate, sizes = llama.model.generate, []

    def small(prompts, **settings):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise error
        return generate(prompts, **settings)

    monkeypatch.setattr(llama.model, "generate", small, raising=False)
    assert ask_all(llama, tmp_path, records, name="halved", batch_size=12) == expected
    assert sizes[:3] == [12, 6, 3] and sum(size for size in sizes if size <= 3) == 24
    assert [record.getMessage() for record in caplog.records] == [
        f"out of memory with a batch of {size} records: halved" for size in sizes if size > 3
    ]
    assert len(caplog.records) <= 4


@pytest.mark.parametrize("options", [{}, {"score": True}], ids=["generation", "score"])
def test_a_forward_that_does_not_fit_halves_a_batch_that_shares_its_beginning(
    llama, tmp_path, monkeypatch, caplog, options
):
    """Memory runs out where rows go on from the cache of a header: halves of the batch share it anew, same answers."""
    header = [1, *range(40, 200)]
    records = [{"prompt_tokens": [*header, *range(300 + 9 * row, 306 + 9 * row)]} for row in range(8)]
    expected = ask_all(llama, tmp_path, records, name="whole", **options)
    forward, shapes = llama.model.forward, []

    def small(*args, **rest):
        ids = rest["input_ids"] if "input_ids" in rest else args[0]
        shapes.append(tuple(ids.shape))
        if len(ids) > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(*args, **rest)

    monkeypatch.setattr(llama.model, "forward", small, raising=False)
    found = ask_all(llama, tmp_path, records, name="halved", batch_size=8, **options)
    for mine, other in zip(found, expected, strict=True):
        assert mine.get("tokens") == other.get("tokens") and "error" not in mine
        if options:
            assert mine["prompt_logprobs"] == pytest.approx(other["prompt_logprobs"], abs=ROUNDING)
    assert "halved" in caplog.text
    assert max(rows for rows, _ in shapes) > 3
    assert {(1, 160), (1, 161)} & set(shapes)  # the header by itself, for `generate` but for its last token


def test_a_record_that_does_not_fit_alone_becomes_an_error(llama, tmp_path, monkeypatch):
    """The floor is one record; with `strict` the run stops there."""
    records = [{"prompt": "short"}, {"prompt": "long " * 50}, {"prompt": "short too"}]
    expected = ask_all(llama, tmp_path, records)
    generate = llama.model.generate

    def small(prompts, **settings):
        if max(map(len, prompts)) > 50:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(prompts, **settings)

    monkeypatch.setattr(llama.model, "generate", small, raising=False)
    answers = ask_all(llama, tmp_path, records, name="out2")
    assert [answers[0], answers[2]] == [expected[0], expected[2]]
    assert answers[1]["line"] == 2 and "memory does not hold this record alone" in answers[1]["error"]
    with pytest.raises(ValueError, match="line 2: the memory"):
        ask_all(llama, tmp_path, records, name="out3", strict=True)


def test_logits_that_are_not_finite_cost_one_record(llama, tmp_path, monkeypatch):
    """The record whose logits overflow gets the error; its batch goes on without it."""
    records = [{"prompt_tokens": [1, 5, 6]}, {"prompt_tokens": [1, 7]}, {"prompt_tokens": [1, 5]}]
    expected = ask_all(llama, tmp_path, records)
    forward = llama.model.forward

    def overflowing(input_ids, **rest):
        output = forward(input_ids, **rest)
        output.logits[(input_ids == 7).any(-1)] = float("nan")
        return output

    monkeypatch.setattr(llama.model, "forward", overflowing, raising=False)
    answers = ask_all(llama, tmp_path, records, name="nan")
    assert [answers[0], answers[2]] == [expected[0], expected[2]]
    assert "nan or inf" in answers[1]["error"] and answers[1]["line"] == 2


def test_other_errors_stop_the_run(llama, tmp_path, monkeypatch):
    """An error in the program is not the record's."""

    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(llama.model, "generate", broken, raising=False)
    with pytest.raises(RuntimeError, match="mat1"):
        ask_all(llama, tmp_path, some_records(2))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_that_is_too_small(tmp_path):
    """A real out-of-memory error, from a GPU's allocator, halves the batch too."""
    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    expected = ask_all(Llama(model, str(TINY)), tmp_path, some_records(400), batch_size=400, batch_tokens=10**9)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((32 << 20) / total)
    try:
        llama = Llama(model.to("cuda"), str(TINY))
        sizes, generate = [], model.generate
        llama.model.generate = lambda prompts, **rest: (sizes.append(len(prompts)), generate(prompts, **rest))[1]
        found = ask_all(llama, tmp_path, some_records(400), name="small", batch_size=400, batch_tokens=10**9)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sizes[0] == 400 and sizes[1] == 200
    same = sum(one["tokens"] == other["tokens"] for one, other in zip(found, expected, strict=True))
    assert same >= 390  # other hardware, other rounding


def test_records_beyond_the_models_positions_cost_themselves_only(tiny_model, tmp_path):
    """GPT-2 has an embedding per position: what reaches beyond becomes an error, the rest of its batch is answered."""
    config = transformers.GPT2Config(vocab_size=1024, n_positions=32, n_embd=32, n_layer=1, n_head=2, eos_token_id=2)
    config.bos_token_id = 1
    llama = Llama(transformers.GPT2LMHeadModel(config).eval(), str(TINY))
    records = [{"prompt_tokens": [5] * length, "max_gen_len": 6} for length in (8, 30, 32, 33, 60)]
    for options in ({"prompt_logprobs": True}, {"score": True}):
        llama.max_seq_len = 32
        within = ask_all(llama, tmp_path, records, name=f"within{next(iter(options))}", **options)
        assert ["error" in answer for answer in within] == [False] * 3 + [True] * 2
        llama.max_seq_len = 64  # more than the model has
        beyond = ask_all(llama, tmp_path, records, name=f"beyond{next(iter(options))}", **options)
        assert "error" not in beyond[0] and "error" in beyond[3] and "error" in beyond[4]
        assert beyond[0].keys() == within[0].keys()
