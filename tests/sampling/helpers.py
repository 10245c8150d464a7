"""What tests of several modules share: the rule in plain Python, and generator states of a device that is not there."""

import torch


def kept_tokens(probs, top_p):
    """The rule in float64 and plain Python: {token: probability}."""
    kept, before = {}, 0.0
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        if before > top_p:
            break
        kept[token] = probs[token]
        before += probs[token]
    return {token: prob / sum(kept.values()) for token, prob in kept.items()}


class CpuStates:
    """Generator states as a device's module gives them: bytes on the host."""

    @staticmethod
    def get_rng_state():
        return torch.zeros(16, dtype=torch.uint8)

    @staticmethod
    def set_rng_state(state):
        assert state.shape == (16,)
