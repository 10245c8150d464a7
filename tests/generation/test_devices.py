"""Device neutrality: on a device that is not the CPU no step of a run mixes devices or waits for the device.

FakeTensorMode runs the operations on tensors of "lazy:0" without values. It raises where tensors of two devices meet,
and where a value would be read on the host.
"""

import dataclasses

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from hf_llama_sampling.generation import mixin
from hf_llama_sampling.generation.loop import LoopState, RowStoppingCriteria, SamplingProcessor, random_stream
from hf_llama_sampling.generation.scoring import Asked, PromptScorer, concatenate, score_in_pieces
from tests.generation.helpers import EOS, RAGGED, SHORT
from tests.sampling.helpers import CpuStates

pytestmark = pytest.mark.slow

ELSEWHERE = torch.device("lazy:0")
VOCAB = 1024
CALLS = {
    "meta": {},
    "seeds": {"seeds": 1},
    "greedy": {"temperature": 0},
    "per row": {"temperature": [0.5, 0, 1], "top_p": [0.5, 0.9, 1], "seeds": 1, "max_gen_len": [2, 9, 5]},
    "logprobs": {"logprobs": True, "top_logprobs": 3, "logprobs_of": [[5], [6, 7], []], "sampling_logprobs": True},
    "no EOS": {"eos_token_id": []},
}


def plan_of(model, prompts, **kwargs):
    """The plan that `generate` makes of a call."""
    plans = []
    with pytest.MonkeyPatch.context() as patch:
        original = mixin.make_plan
        patch.setattr(mixin, "make_plan", lambda *args: plans.append(original(*args)) or plans[0])
        model.generate(prompts, **{"max_gen_len": 9, "eos_token_id": [EOS], **kwargs})
    return plans[0]


@pytest.mark.parametrize("schedule", ["reference", "padded"])
@pytest.mark.parametrize("prompts", [RAGGED, [SHORT] * 3], ids=["ragged", "equal"])
@pytest.mark.parametrize("call", CALLS)
def test_the_step_and_the_stop_stay_on_the_device_and_never_wait(tiny_model, monkeypatch, call, prompts, schedule):
    """All columns of a run, forced ones among them; whether all rows are done is the loop's question, not ours."""
    monkeypatch.setattr("hf_llama_sampling.sampling.streams._random_module", lambda device: (CpuStates, []))
    on_cpu = plan_of(tiny_model, prompts, schedule=schedule, **CALLS[call])
    with FakeTensorMode():
        plan = dataclasses.replace(on_cpu, device=ELSEWHERE)
        state = LoopState.before(plan)
        step, stop = SamplingProcessor(plan, state, random_stream(plan), []), RowStoppingCriteria(plan, state, [])
        ids, _ = plan.layout
        for _ in range(plan.steps):
            scores = step(ids, torch.zeros(3, VOCAB, device=ELSEWHERE, dtype=torch.bfloat16))
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
            assert stop(ids, None).device == scores.device == ELSEWHERE
        assert len(state.finite_checks) == plan.steps
        assert all(part.device == ELSEWHERE for scored in state.scores for part in scored)


@pytest.mark.parametrize("top", [0, 3])
def test_scoring_stays_on_the_device_and_never_waits(top):
    """In pieces that do not divide the columns, and through the scorer of prompts, chunk by chunk."""

    class Output:
        def __init__(self, width):
            self.logits = torch.zeros(3, width, VOCAB, device=ELSEWHERE)

    with FakeTensorMode():
        targets = torch.zeros(3, 8, dtype=torch.long, device=ELSEWHERE)
        asked = Asked(top, [[5, 6], [7], []][: 3 if top else 0] or [[]] * 3, ELSEWHERE)
        ids = asked.ids[:, None].expand(-1, 8, -1)
        scores, bad = score_in_pieces(Output(8).logits, targets, ids, top, chunk_bytes=1 << 16)
        assert {part.device for part in [*scores, bad]} == {ELSEWHERE}
        scorer = PromptScorer("a model", targets, columns=9, chunk=4, asked=asked, chunk_bytes=1 << 16)
        for width in (4, 4, 1):
            assert scorer(lambda logits_to_keep, width=width: Output(width), logits_to_keep=1).logits.shape[1] == 1
        assert concatenate(scorer.parts).logprobs.shape == (3, 8)


def test_a_wait_and_a_mix_of_devices_are_caught(tiny_model, monkeypatch):
    """The tests above can fail: with the CPU's look at nan, and with a state that stays on the CPU."""
    on_cpu = plan_of(tiny_model, [SHORT] * 3, seeds=1)
    with FakeTensorMode():
        ids, logits = torch.zeros(3, 3, dtype=torch.long, device=ELSEWHERE), torch.zeros(3, VOCAB, device=ELSEWHERE)
        state = LoopState.before(plan := dataclasses.replace(on_cpu, device=ELSEWHERE))
        step = SamplingProcessor(plan, state, random_stream(plan), [])
        with monkeypatch.context() as patch, pytest.raises((DataDependentOutputException, RuntimeError)):
            patch.setattr("hf_llama_sampling.sampling.fast_path.on_cpu", lambda values: True)
            step(ids, logits)
        mixed = LoopState.before(dataclasses.replace(on_cpu))
        with pytest.raises(RuntimeError, match="device"):
            SamplingProcessor(plan, mixed, random_stream(plan), [])(ids, logits)
