"""Device neutrality: on a device that is not the CPU nothing of a draw mixes devices or waits for the device.

No such device is needed: FakeTensorMode runs the operations on tensors of "lazy:0" without values. It raises where
tensors of two devices meet, and where a value would be read on the host.
"""

import contextlib

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from hf_llama_sampling import LlamaSampler, LlamaTemperatureLogitsWarper, LlamaTopPLogitsWarper, sample_top_p
from hf_llama_sampling.sampling.sampler import TokenSampler
from hf_llama_sampling.sampling.settings import SamplingSettings
from hf_llama_sampling.sampling.streams import LookAhead, MetaStream, PromptStreams
from tests.sampling.helpers import CpuStates

pytestmark = pytest.mark.slow

ELSEWHERE = torch.device("lazy:0")


@contextlib.contextmanager
def elsewhere():
    """Texts (3, 9) and scores (3, 500) on a device that is not the CPU, as fakes."""
    with FakeTensorMode():
        yield torch.ones(3, 9, dtype=torch.long, device=ELSEWHERE), torch.zeros(3, 500, device=ELSEWHERE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        LlamaSampler,
        lambda: LlamaSampler(0),
        lambda: LlamaSampler(seeds=1),
        lambda: LlamaSampler([0.5, 0, 1e-40], [0.5, 0.9, 1]),
        lambda: LlamaSampler([0.5, 0, 1], [0.5, 0.9, 1], seeds=[1, 2, 3]),
        lambda: LlamaTemperatureLogitsWarper(0.6),
        lambda: LlamaTemperatureLogitsWarper(0),
        lambda: LlamaTopPLogitsWarper(0.9),
    ],
)
def test_processors_stay_on_the_device_and_never_wait(make, dtype):
    """Over more columns than are computed ahead."""
    processor = make()
    with elsewhere() as (ids, scores):
        for _ in range(70):
            answer = processor(ids, scores.to(dtype))
            ids = torch.cat([ids, answer.argmax(-1, keepdim=True)], dim=1)
        assert answer.device == ELSEWHERE
        assert answer.shape == (3, 500)


@pytest.mark.parametrize("with_mass", [True, False])
@pytest.mark.parametrize(
    "stream",
    [
        lambda: MetaStream(None),
        lambda: LookAhead([2, 5, 3], 5, None),
        lambda: PromptStreams([1, 2, 2], [0, 0, 1], [0, -1, -2]),
    ],
)
@pytest.mark.parametrize("settings", [SamplingSettings(), SamplingSettings([0.5, 0, 1], [0.5, 0.9, 1])])
def test_a_step_stays_on_the_device_and_never_waits(monkeypatch, stream, settings, with_mass):
    """Under all three streams. The state of a device's generator is bytes on the host, here the CPU's own."""
    monkeypatch.setattr("hf_llama_sampling.sampling.streams._random_module", lambda device: (CpuStates, []))
    with elsewhere() as (_, scores):
        sampler = TokenSampler(settings, stream(), rows=3, device=ELSEWHERE)
        for column in range(5, 9):
            draw = sampler(scores, column, with_mass=with_mass)
            assert {field.device for field in draw if field is not None} == {ELSEWHERE}


def test_sample_top_p_stays_on_the_device_and_never_waits():
    """It cannot look for nan there either."""
    with elsewhere() as (_, scores):
        assert sample_top_p(torch.softmax(scores, -1), 0.9).device == ELSEWHERE


def test_a_wait_and_a_mix_of_devices_are_caught(monkeypatch):
    """The tests above can fail: on the CPU's path, and with a setting that stays on the CPU."""
    with elsewhere() as (ids, scores):
        with monkeypatch.context() as patch, pytest.raises((DataDependentOutputException, RuntimeError)):
            patch.setattr("hf_llama_sampling.sampling.fast_path.on_cpu", lambda values: True)
            LlamaSampler()(ids, scores)
        sampler = TokenSampler(SamplingSettings([0.5, 0.6, 1]), MetaStream(None), rows=3, device=torch.device("cpu"))
        with pytest.raises(RuntimeError, match="device"):
            sampler(scores, 9)
