"""What the soak counts, it sees."""

import threading

import pytest
import torch

from tests.soak import Held, quarter

pytestmark = pytest.mark.slow


def test_what_is_held_is_counted(tmp_path):
    """A file, a thread and a tensor that are left each raise a count, and lower it when they go."""
    before = Held.now()
    release = threading.Event()
    left = threading.Thread(target=release.wait)
    left.start()
    with open(tmp_path / "file", "w"):
        tensor = torch.ones(3)
        held = Held.now()
    release.set()
    left.join()
    del tensor
    assert held[:3] == (before.files + 1, before.threads + 1, before.tensors + 1)
    assert Held.now()[:3] == before[:3]


def test_memory_is_compared_by_quarters():
    """A peak does not count, growth does."""
    held = [Held(1, 1, 1, mib) for mib in (1, 2, 3, 3, 900, 3, 4, 4, 4, 5, 5, 5)]
    assert (quarter(held, 1), quarter(held, 3)) == (3, 5)
