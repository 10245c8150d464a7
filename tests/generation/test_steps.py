"""What one step costs: waits for the device, and operations."""

import pytest
import torch

from hf_llama_sampling import LlamaGenerationMixin, LlamaSampler
from hf_llama_sampling.generation.loop import SamplingProcessor
from tests.benchmarks.measure import Waits
from tests.generation.helpers import RAGGED, SHORT, Count, as_on_another_device, padded

pytestmark = pytest.mark.slow

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


# Operations of the sampling processor in a padded, ragged batch, on CPU and elsewhere, and a few to spare. On Meta's
# stream such a batch looks ahead. Elsewhere one row's settings of its own cost more than one for all.
MOST = {
    "greedy": (10, 16),
    "meta": (60, 40),
    "seeds": (32, 28),
    "per row": (58, 45),
    "per row, meta": (70, 50),
    "logprobs": (70, 52),
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


NEVER_MADE = 1023  # an EOS that no run here comes to
STEP = {"meta": {}, "seeds": {"seeds": 1}, "greedy": {"temperature": 0}}


@pytest.mark.parametrize(("elsewhere", "most"), [(False, 30), (True, 20)])
@pytest.mark.parametrize("stop", [[], [NEVER_MADE]])
@pytest.mark.parametrize("call", STEP)
def test_a_step_is_few_operations_beyond_transformers_own(tiny_model, monkeypatch, call, stop, elsewhere, most):
    """All of a decode step, the model's own work included, less all of transformers' sampled one: with logprobs off,
    at most 30 on CPU and 20 on the path of other devices."""
    if elsewhere:
        as_on_another_device(monkeypatch)
    ids = torch.tensor([SHORT] * 3)

    def operations(run):
        counts = []
        for steps in (6, 22):
            torch.manual_seed(1)
            with Count() as count:
                assert run(steps).shape[1] == 3 + steps
            counts.append(count.computed)
        return (counts[1] - counts[0]) / 16

    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0, "pad_token_id": 0}
    theirs = operations(
        lambda steps: super(LlamaGenerationMixin, tiny_model).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, eos_token_id=stop or None, **sampled
        )
    )
    ours = operations(lambda steps: tiny_model.generate(ids, max_gen_len=steps, eos_token_id=stop, **STEP[call]))
    assert ours - theirs <= most
