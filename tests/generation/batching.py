"""What tests of continuous batching share: configs, answers in one form, and a CPU posing as a device with streams."""

import contextlib
import types

import pytest
import transformers

from tests.generation.helpers import EOS

# A cache of ten pages: requests of the tests make room for each other all the time.
FEW = {"num_blocks": 10, "page_size": 8, "max_batch_tokens": 24}


def config(**options):
    """transformers' config of continuous batching, with few blocks if nothing is said."""
    return transformers.ContinuousBatchingConfig(**{**FEW, **options})


def answer(result):
    """A result's tokens as `generate` gives them: without the EOS that ended them."""
    assert result.error is None and result.is_finished()
    tokens = result.generated_tokens
    return tokens[:-1] if tokens[-1:] == [EOS] else list(tokens)


def answers(results):
    """The tokens of all results, in order."""
    return [answer(result) for result in results.values()]


def without_collections(monkeypatch):
    """Spare garbage collections: transformers makes two whenever a manager stops, longer than a run of a tiny model."""
    from transformers.generation.continuous_batching import continuous_api

    monkeypatch.setattr(continuous_api, "gc", types.SimpleNamespace(collect=lambda: 0))


class Stream:
    """A stream or an event of a device that does everything at once."""

    def record_event(self, event):
        """Nothing is pending."""

    wait_event = record_event

    def synchronize(self):
        """Nothing is pending."""


@contextlib.contextmanager
def cpu_as_a_device():
    """Let transformers run its asynchronous loop, and keep pinned memory, on the CPU."""
    batching = "transformers.generation.continuous_batching"
    from transformers.generation.continuous_batching import input_outputs, offloading_manager

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_outputs.ContinuousBatchingAsyncIOs, "_supported_device_types", ("cpu",))
        patch.setattr(input_outputs, "torch", _Torch(input_outputs.torch))
        patch.setattr(offloading_manager, "torch", _Torch(offloading_manager.torch))
        patch.setattr(input_outputs, "create_device_stream", lambda device: Stream())
        for module in ("input_outputs", "offloading_manager", "model_runner", "continuous_api"):
            patch.setattr(f"{batching}.{module}.stream_context", lambda stream: contextlib.nullcontext())
        yield


class _Torch:
    """torch, with events of a CPU, and memory that is not pinned."""

    def __init__(self, torch):
        self.torch = torch

    def __getattr__(self, name):
        return getattr(self.torch, name)

    def Event(self, device, enable_timing):
        return Stream()

    def empty(self, *args, pin_memory=False, **kwargs):
        return self.torch.empty(*args, **kwargs)

    def get_device_module(self, device):
        return self.torch.cpu
