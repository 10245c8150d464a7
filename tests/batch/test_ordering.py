"""Which requests meet in a batch: shared prefixes, like lengths, and nothing that depends on processes."""

import random

from hf_llama_sampling.batch.ordering import batches, common_length, cost, prefix_order
from hf_llama_sampling.batch.requests import Request
from tests.batch.helpers import ask_all, read
from tests.bounds import ROUNDING


def test_batches_are_the_longest_first_and_within_limits():
    """Every request once; at most so many rows and tokens, unless it is a row alone."""
    rng = random.Random(0)
    requests = [Request(i, "null", [1] * rng.randint(1, 50), 1, 1, rng.randint(0, 50), i) for i in range(200)]
    found = list(batches(requests, rows=8, tokens=300))
    assert sorted(request.index for group in found for request in group) == list(range(200))
    lengths = [len(request.prompt) for group in found for request in group]
    assert lengths == sorted(lengths, reverse=True)
    for group in found:
        assert len(group) <= 8 and (len(group) == 1 or cost(group) <= 300)
    assert max(map(len, batches(requests, rows=8, tokens=500))) == 8
    assert list(batches(reversed(requests), rows=8, tokens=300)) == found


def requests_of(*prompts, limit=8):
    """Requests with these prompts, in this order."""
    return [Request(i, "null", prompt, 1, 1, limit, i) for i, prompt in enumerate(prompts)]


def shuffled(requests, seed=0):
    """The same requests, each with its index, in another order."""
    return random.Random(seed).sample(requests, len(requests))


def test_equal_prompts_meet_in_one_batch():
    """Four prompts with eight seeds each, scattered: every batch of eight is one prompt, of sixteen two whole ones."""
    rng = random.Random(1)
    prompts = [[1, *(rng.randint(3, 900) for _ in range(length))] for length in (30, 30, 12, 90)]
    requests = shuffled(requests_of(*prompts * 8))
    for rows, kinds in ((8, 1), (16, 2), (32, 4)):
        found = list(batches(requests, rows=rows, tokens=10**6))
        assert [len(batch) for batch in found] == [rows] * (32 // rows)
        assert all(len({tuple(request.prompt) for request in batch}) == kinds for batch in found)


def test_other_records_do_not_tear_equal_prompts_apart():
    """Eight equal prompts among thirty others, of the same and other lengths, where 32 fit a batch: two batches."""
    rng = random.Random(2)
    others = [[1, *(rng.randint(3, 900) for _ in range(rng.randint(2, 40)))] for _ in range(30)]
    for length in (5, 20, 40):
        equal = [1, *range(3, 2 + length)]
        found = list(batches(shuffled(requests_of(*others, *[equal] * 8)), rows=32, tokens=10**6))
        assert len(found) == 2
        assert sorted(sum(request.prompt == equal for request in batch) for batch in found) == [0, 8]


def test_prompts_with_a_long_common_header_meet_whatever_their_length():
    """Two headers of 200 tokens, scattered, with rests of 1 to 60: no batch mixes them, where rows allow."""
    rng = random.Random(3)
    headers = [[1, *(rng.randint(3, 900) for _ in range(200))] for _ in range(2)]
    prompts = [headers[i % 2] + [rng.randint(3, 900) for _ in range(rng.randint(1, 60))] for i in range(32)]
    found = list(batches(shuffled(requests_of(*prompts)), rows=16, tokens=10**6))
    assert [len(batch) for batch in found] == [16, 16]
    for batch in found:
        assert len({tuple(request.prompt[:201]) for request in batch}) == 1


def test_prompts_that_share_little_are_ordered_by_length():
    """A BOS, or a few words, in common is worth no padding: lengths fall from first to last."""
    rng = random.Random(4)
    prompts = [[1, 5, 6, *(rng.randint(100, 900) for _ in range(rng.randint(20, 200)))] for _ in range(100)]
    lengths = [len(request.prompt) for request in prefix_order(shuffled(requests_of(*prompts)))]
    assert lengths == sorted(lengths, reverse=True)


def test_scoring_walks_the_tree_of_prompts():
    """A header, contexts under it, continuations under these: siblings stand together at every level."""
    rng = random.Random(5)

    def tokens(count):
        return [rng.randint(3, 900) for _ in range(count)]

    header = [1, *tokens(100)]
    contexts = [header + tokens(rng.randint(30, 60)) for _ in range(8)]
    prompts = [context + tokens(6) for context in contexts for _ in range(4)]
    ordered = prefix_order(shuffled(requests_of(*prompts)))
    for start in range(0, 32, 4):
        assert len({request.index // 4 for request in ordered[start : start + 4]}) == 1
    found = list(batches(shuffled(requests_of(*prompts, limit=0)), rows=8, tokens=10**6, whole_tree=True))
    assert [len({request.index // 4 for request in batch}) for batch in found] == [2, 2, 2, 2]


def test_the_order_of_the_input_plays_no_part():
    """Whatever order requests come in, the batches are the same; so they do not depend on processes."""
    rng = random.Random(6)
    prompts = [[1] + [rng.randint(3, 5) for _ in range(rng.randint(0, 12))] for _ in range(150)]
    requests = requests_of(*prompts)
    for whole_tree in (False, True):
        first = list(batches(requests, rows=7, tokens=200, whole_tree=whole_tree))
        assert sorted(request.index for batch in first for request in batch) == list(range(150))
        for seed in range(3):
            again = list(batches(shuffled(requests, seed), rows=7, tokens=200, whole_tree=whole_tree))
            assert again == first


def test_the_cuts_are_the_cheapest():
    """Of all ways to cut a short ordered list, none costs less, by the documented cost."""
    rng = random.Random(7)

    def price(batch):
        longest, most = max(len(r.prompt) for r in batch), max(r.limit for r in batch)
        prefix = longest if len(batch) == 1 else min(common_length(batch[0].prompt, r.prompt) for r in batch)
        distinct = len({tuple(r.prompt) for r in batch})
        return prefix + distinct * (longest - prefix) + most * len(batch) + (most + 1) * 64

    def cheapest(ordered):
        if not ordered:
            return 0
        firsts = [ordered[:n] for n in range(1, min(3, len(ordered)) + 1)]
        fitting = [first for first in firsts if len(first) == 1 or cost(first) <= 60]
        return min(price(first) + cheapest(ordered[len(first) :]) for first in fitting)

    for _ in range(30):
        prompts = [[1] + [rng.randint(3, 4) for _ in range(rng.randint(0, 30))] for _ in range(9)]
        requests = [Request(i, "null", p, 1, 1, rng.choice([0, 1, 5]), i) for i, p in enumerate(prompts)]
        found = list(batches(requests, rows=3, tokens=60))
        assert sum(map(price, found)) == cheapest([request for batch in found for request in batch])


def test_records_of_one_prompt_and_several_seeds_share_a_call(llama, tmp_path, monkeypatch):
    """In a run: five seeds of each of three prompts, scattered, by fives: three calls, each with one prompt."""
    records = [{"prompt": prompt, "seed": seed} for seed in range(5) for prompt in ("the king", "O my lord", "ROMEO:")]
    expected = ask_all(llama, tmp_path, records, name="alone", batch_size=1)
    generate, calls = llama.model.generate, []

    def spying(prompts, **settings):
        calls.append(prompts)
        return generate(prompts, **settings)

    monkeypatch.setattr(llama.model, "generate", spying, raising=False)
    assert ask_all(llama, tmp_path, records, batch_size=5) == expected
    assert [len(prompts) for prompts in calls] == [5, 5, 5]
    assert all(prompts == [prompts[0]] * 5 for prompts in calls)


def test_scores_do_not_depend_on_the_order(llama, tmp_path):
    """Texts with common beginnings, scored by threes in two orders: the same numbers for each, up to rounding."""
    texts = ["ROMEO: what", "ROMEO: what light", "the king", "ROMEO:", "the king of all", "the"]
    first = ask_all(llama, tmp_path, [{"prompt": text} for text in texts], score=True, batch_size=3)
    ask_all(llama, tmp_path, [{"prompt": text} for text in texts[::-1]], name="other", score=True, batch_size=2)
    for one, other in zip(first, read(tmp_path / "other")[::-1], strict=True):
        assert one["prompt_tokens"] == other["prompt_tokens"]
        for a, b in zip(one["prompt_logprobs"], other["prompt_logprobs"], strict=True):
            assert abs(a - b) <= ROUNDING
