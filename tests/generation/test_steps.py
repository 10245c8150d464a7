"""What one step costs: waits for the device, and operations."""

import pytest
import torch

from hf_llama_sampling import LlamaGenerationMixin, LlamaSampler
from hf_llama_sampling.generation.loop import SamplingProcessor
from tests.benchmarks.measure import Waits
from tests.generation.helpers import RAGGED, Count, as_on_another_device, padded

CALLS = {
    "meta": {},
    "seeds": {"seeds": 1},
    "greedy": {"temperature": 0},
    "per row": {"temperature": [0.5, 0, 1], "top_p": [0.5, 0.9, 1], "seeds": 1},
    "per row, meta": {"temperature": [0.5, 0, 1], "max_gen_len": [99, 90, 80]},
    "logprobs": {"logprobs": True, "top_logprobs": 3, "echo": True},
}


@pytest.mark.parametrize("schedule", ["reference", "padded"])
@pytest.mark.parametrize("call", CALLS)
def test_a_step_waits_for_the_device_once(tiny_model, monkeypatch, call, schedule):
    """The loop's own question whether all rows are done, and no other, on the path of devices other than the CPU.

    With padding transformers also asks its mask in each step: then ours waits as often as its own generate does.
    """
    as_on_another_device(monkeypatch)

    def waits(steps):
        kwargs = {"max_gen_len": steps, "eos_token_id": [], "schedule": schedule, **CALLS[call]}
        if "max_gen_len" in CALLS[call]:
            kwargs["max_gen_len"] = [steps - 2, steps, steps - 1]
        with Waits() as counted:
            tiny_model.generate(RAGGED, **kwargs)
        return len(counted.waits)

    def waits_of_transformers(steps):
        given = padded(RAGGED, "left")
        greedy = {"do_sample": False, "max_new_tokens": steps, "eos_token_id": None, "pad_token_id": 0}
        with Waits() as counted:
            super(LlamaGenerationMixin, tiny_model).generate(**given, **greedy)
        return len(counted.waits)

    most = 10 if schedule == "reference" else waits_of_transformers(24) - waits_of_transformers(14)
    assert waits(24) - waits(14) <= most


@pytest.mark.parametrize(
    "sampler",
    [
        lambda: LlamaSampler(),
        lambda: LlamaSampler(seeds=1),
        lambda: LlamaSampler(0),
        lambda: LlamaSampler([0.5, 0, 1], [0.5, 0.9, 1], seeds=1),
    ],
)
def test_the_sampler_alone_never_waits(monkeypatch, sampler):
    """No operation of a draw reads a tensor on the host, on the path of other devices."""
    as_on_another_device(monkeypatch)
    draw, ids = sampler(), torch.ones(3, 9).long()
    draw(ids, torch.randn(3, 2000))  # the first one sets up the streams
    for width in (3.0, 0.3):  # peaked and flat
        logits = torch.randn(3, 2000) * width
        with Waits() as counted:
            draw(ids, logits)
        assert counted.waits == []


# What a step of ours adds to the model's and the loop's work, as measured, and a few to spare: on CPU, where some of it
# is NumPy's, and elsewhere, where ten rounds of Philox are 60 of them.
MOST = {
    "greedy": (23, 23),
    "meta": (72, 50),
    "seeds": (58, 105),
    "per row": (96, 115),
    "per row, meta": (120, 60),
    "logprobs": (78, 56),
}


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("call", MOST)
def test_a_step_is_a_bounded_number_of_operations(tiny_model, monkeypatch, call, elsewhere):
    """Counted by dispatch mode over the processor that draws: the median step of a run."""
    if elsewhere:
        as_on_another_device(monkeypatch)
    counts = []
    original = SamplingProcessor.__call__

    def counted(self, input_ids, scores):
        with Count() as count:
            result = original(self, input_ids, scores)
        counts.append(count.computed)
        return result

    monkeypatch.setattr(SamplingProcessor, "__call__", counted)
    kwargs = {"eos_token_id": [], "schedule": "padded", **CALLS[call], "max_gen_len": 13}
    tiny_model.generate(RAGGED, **kwargs)
    assert sorted(counts)[6] <= MOST[call][elsewhere], sorted(counts)
