"""Philox: the published answers, plain Python's, and NumPy's."""

import random

import pytest
import torch

from hf_llama_sampling.sampling import philox
from hf_llama_sampling.sampling.philox import philox2x32, philox2x32_in_numpy, philox4x32

ALL = 0xFFFFFFFF

# Random123's kat_vectors: all zeros, all ones, the digits of pi.
KNOWN_4X32 = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL,) * 4, (ALL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
KNOWN_2X32 = [
    ((0, 0), 0, 0xFF1DAE59),
    ((ALL, ALL), ALL, 0x2C3F628B),
    ((0x243F6A88, 0x85A308D3), 0x13198A2E, 0xDD7CE038),
]


def words(*values):
    """Each value as an int64 tensor of one word."""
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_4X32)
def test_philox4x32_gives_the_published_answers(counter, key, answer):
    """Philox4x32-10 of Random123's known-answer file."""
    assert tuple(int(word) for word in philox4x32(words(*counter), words(*key))) == answer


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_2X32)
def test_philox2x32_gives_the_published_answers(counter, key, answer):
    """The first word of Philox2x32-10 of Random123's known-answer file."""
    assert int(philox2x32(*words(*counter), *words(key))) == answer


def plain_philox4x32(counter, key):
    """Salmon et al. 2011, figure 2 and section 3.3, with Python's integers."""
    x0, x1, x2, x3 = counter
    for turn in range(10):
        k0, k1 = ((key[i] + turn * weyl) % 2**32 for i, weyl in enumerate((0x9E3779B9, 0xBB67AE85)))
        high0, low0 = divmod(0xD2511F53 * x0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
    return x0, x1, x2, x3


def plain_philox2x32(counter, key):
    """The same for two words."""
    x0, x1 = counter
    for turn in range(10):
        high, low = divmod(0xD256D193 * x0, 2**32)
        x0, x1 = high ^ ((key + turn * 0x9E3779B9) % 2**32) ^ x1, low
    return x0, x1


def test_philox_equals_plain_python_on_random_words():
    """On 500 random inputs, words of all bits and words at the ends of the range among them."""
    draw = random.Random(0)
    edges = (0, 1, 2**31 - 1, 2**31, ALL)
    rows = [[draw.choice(edges) if draw.random() < 0.2 else draw.getrandbits(32) for _ in range(6)] for _ in range(500)]
    columns = torch.tensor(rows).unbind(-1)
    ours = torch.stack(philox4x32(columns[:4], columns[4:]), -1).tolist()
    assert ours == [list(plain_philox4x32(row[:4], row[4:])) for row in rows]
    assert philox2x32(*columns[:3]).tolist() == [plain_philox2x32(row[:2], row[2])[0] for row in rows]


@pytest.mark.parametrize("ids", [1, 2, 3, 999, 1000, 1001, 4500])
def test_philox_in_numpy_equals_philox_on_tensors(monkeypatch, ids):
    """Also where Python computes a few words, and where the ids are computed in spans, the last one short."""
    monkeypatch.setattr(philox, "_SPAN", 1000)
    draw = torch.Generator().manual_seed(ids)
    tokens = torch.randint(0, 2**32, (3, ids), generator=draw)
    salt, key = (torch.randint(0, 2**32, (3, 1), generator=draw) for _ in range(2))
    assert torch.equal(philox2x32_in_numpy(tokens, salt.numpy(), key.numpy()), philox2x32(tokens, salt, key))
