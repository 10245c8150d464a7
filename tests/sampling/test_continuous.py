"""The sampler of continuous batching: each request's draw is that of its own stream, on any device, without a wait."""

import types

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from hf_llama_sampling.sampling import fast_path
from hf_llama_sampling.sampling.continuous import RequestSampler, RequestSettings, draw_requests
from hf_llama_sampling.sampling.sampler import TokenSampler
from hf_llama_sampling.sampling.settings import SamplingSettings
from hf_llama_sampling.sampling.streams import PromptStreams
from tests.bounds import float32_steps

ELSEWHERE = torch.device("lazy:0")
# Temperature, top_p, seed, copy, position of the next token
REQUESTS = [
    *((0.6, 0.9, seed, 0, position) for seed, position in enumerate([1, 63, 64, 127, 128, 1000])),
    *((1.0, 1.0, 2**64 - 1, copy, 70) for copy in range(3)),
    *((0.0, 0.9, 4, 0, 5), (1e-40, 0.9, 4, 0, 5), (1.7, 0.0, 4, 0, 5), (1.7, 0.5, 2**40, 11, 5)),
]


def in_flight(temperature, top_p, seed, copy, position, *, has_new_token=True):
    """A request as transformers' loop shows it to the sampler."""
    settings = RequestSettings(temperature, top_p, seed, "mine")
    name = f"mine__child#{copy - 1}" if copy else "mine"
    state = types.SimpleNamespace(
        request_id=name, position_offset=position, logit_processor_kwargs={RequestSampler.KEY: settings}
    )
    return types.SimpleNamespace(state=state, has_new_token=has_new_token)


def prepared(sampler, requests, room=32):
    """(4, room) int32: the sampler's values of these requests."""
    values = torch.empty(sampler.tensors_required, room, dtype=torch.int32)
    defaults = torch.empty(sampler.tensors_required, 1, dtype=torch.int32)
    sampler.fill_defaults(defaults)
    values[:] = defaults
    return sampler.prepare_tensor_args(requests, values)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("which", [slice(None), slice(9, 10)])
def test_a_draw_is_that_of_the_requests_own_stream(monkeypatch, elsewhere, which):
    """Whatever the others ask for, those still in their prompts among them; on the CPU's path and any other."""
    if elsewhere:
        monkeypatch.setattr(fast_path, "on_cpu", lambda values: False)
    sampler = RequestSampler(logprobs=True)
    requests = REQUESTS[which]
    scores = 3 * torch.randn(len(requests), 2000)
    shown = [in_flight(*request) for request in requests]
    shown.insert(1, in_flight(1.0, 1.0, 9, 0, 3, has_new_token=False))
    one_hot = sampler(None, scores, prepared(sampler, shown))
    for row, (temperature, top_p, seed, copy, position) in enumerate(requests):
        alone = TokenSampler(
            SamplingSettings(temperature, top_p),
            PromptStreams([seed], [copy], [0]),
            rows=1,
            device=scores.device,
        )(scores[row : row + 1], position)
        assert (one_hot[row] == 0).nonzero().tolist() == [alone.tokens.tolist()]
        raw = float(torch.log_softmax(scores[row].double(), -1)[alone.tokens])
        assert abs(float(sampler.values[row]) - raw) <= float32_steps(20.0, 4)


def test_stale_values_of_requests_that_are_gone_disturb_nobody():
    """The loop computes a row for each request in the batch, though some get no token yet."""
    sampler = RequestSampler(logprobs=False)
    scores = torch.randn(3, 50)
    values = prepared(sampler, [in_flight(*REQUESTS[0]), in_flight(*REQUESTS[1])])
    expected = sampler(None, scores[:2], values)
    sampler.prepare_tensor_args([in_flight(1.0, 1.0, 9, 0, 3, has_new_token=False)], values)
    assert torch.equal(sampler(None, scores, values)[:2], expected)
    assert sampler.values.tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 0.6])
def test_bad_logits_show_in_the_values(bad, temperature):
    """In their own row alone, whether logprobs are wanted or not."""
    requests = [in_flight(temperature, 0.9, 1, 0, 5), in_flight(0.6, 0.9, 2, 0, 5)]
    scores = torch.randn(2, 50)
    scores[0, 7] = bad
    for logprobs in (False, True):
        sampler = RequestSampler(logprobs=logprobs)
        sampler(None, scores, prepared(sampler, requests))
        assert sampler.values.isnan().tolist() == [True, False]
        sampler(None, scores[:1], prepared(sampler, requests[:1]))
        assert sampler.values.isnan().tolist() == [True]


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_step_stays_on_the_device_and_never_waits(logprobs):
    """Values of requests come to the device with the ids; nothing of the draw looks at them on the host."""
    sampler = RequestSampler(logprobs=logprobs)
    with FakeTensorMode():
        scores, values = torch.zeros(3, 500, device=ELSEWHERE), torch.zeros(4, 3, dtype=torch.int32, device=ELSEWHERE)
        answer = sampler(torch.ones(3, dtype=torch.long, device=ELSEWHERE), scores, values)
        stored = torch.zeros(2, 9, dtype=torch.int32, device=ELSEWHERE)
        sampler.store(lambda scores, output_ids: output_ids[0, :3].copy_(scores[0].argmax(-1)), answer[None], stored)
        assert answer.device == stored.device == sampler.values.device == ELSEWHERE


def test_a_wait_is_caught(monkeypatch):
    """The test above can fail: on the CPU's path."""
    monkeypatch.setattr(fast_path, "on_cpu", lambda values: True)
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, RuntimeError)):
        draw_requests(torch.zeros(3, 500, device=ELSEWHERE), torch.zeros(4, 3, dtype=torch.int32, device=ELSEWHERE))
