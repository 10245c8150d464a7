"""One object of ours serves whatever comes next: another batch, device, dtype, thread or grad mode."""

import copy
import pickle
import threading

import pytest
import torch

from hf_llama_sampling import LlamaSampler, LlamaTemperatureLogitsWarper, LlamaTopPLogitsWarper, sample_top_p
from hf_llama_sampling.sampling import fast_path
from tests.generation.helpers import as_on_another_device

MAKERS = {
    "greedy": lambda: LlamaSampler(0),
    "seeds": lambda: LlamaSampler(seeds=3),
    "generator": lambda: LlamaSampler(generator=torch.Generator().manual_seed(3)),
    "global generator": LlamaSampler,
    "temperature": lambda: LlamaTemperatureLogitsWarper(0.6),
    "top_p": lambda: LlamaTopPLogitsWarper(0.9),
}
PER_ROW = {
    "seeds": lambda: LlamaSampler([0.6, 0, 1.2], [0.9, 0.5, 1.0], seeds=[4, 5, 6]),
    "generator": lambda: LlamaSampler([0.6, 0, 1.2], [0.9, 0.5, 1.0], generator=torch.Generator().manual_seed(3)),
}
GRAD_MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def inputs(rows, columns, vocab, seed=0):
    """Texts and scores."""
    draw = torch.Generator().manual_seed(seed)
    return torch.ones(rows, columns, dtype=torch.long), torch.randn(rows, vocab, generator=draw) * 3


@pytest.mark.parametrize("kind", MAKERS)
def test_a_used_object_answers_as_a_new_one(kind):
    """After batches, vocabularies, texts and dtypes of other sizes; a shared generator goes on where it stood."""
    used = MAKERS[kind]()
    for rows, columns, vocab, dtype in [
        (3, 5, 900, torch.float32),
        (1, 9, 900, torch.float32),
        (2, 200, 40, torch.bfloat16),
        (4, 3, 9000, torch.float16),
        (3, 5, 900, torch.float64),
        (3, 5, 900, torch.float32),
    ]:
        ids, scores = inputs(rows, columns, vocab)
        new = MAKERS[kind]()
        if kind == "generator":
            new.generator.set_state(used.generator.get_state())
        state = torch.get_rng_state()
        answer = used(ids, scores.to(dtype))
        torch.set_rng_state(state)
        assert torch.equal(answer, new(ids, scores.to(dtype))), (rows, dtype)


@pytest.mark.parametrize("after", GRAD_MODES)
@pytest.mark.parametrize("before", GRAD_MODES)
@pytest.mark.parametrize("kind", [*MAKERS, "per row"])
def test_grad_modes_may_change_between_calls(kind, before, after):
    """First used in one mode, then in another: nothing made in inference mode is changed or saved outside of it."""
    make = PER_ROW["seeds"] if kind == "per row" else MAKERS[kind]
    used, (ids, scores) = make(), inputs(3, 5, 900)
    with GRAD_MODES[before]():
        used(ids, scores * 1.0)
    torch.manual_seed(1)
    with GRAD_MODES[after]():
        answer = used(ids, scores * 1.0)
    torch.manual_seed(1)
    new = make()
    if kind == "generator":
        new(ids, scores)
    assert torch.equal(answer, new(ids, scores))


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("kind", ["greedy", "seeds", "generator", "global generator"])
@pytest.mark.parametrize("vocab", [900, 40_000])
def test_the_sampler_draws_from_scores_that_require_grad(monkeypatch, kind, vocab, on_cpu):
    """The same tokens, and an answer that no gradient goes through; peaked and flat rows."""
    if not on_cpu:
        as_on_another_device(monkeypatch)
    for width in (1.0, 0.01):
        ids, scores = inputs(2, 5, vocab)
        torch.manual_seed(2)
        plain = MAKERS[kind]()(ids, scores * width)
        torch.manual_seed(2)
        answer = MAKERS[kind]()(ids, (scores * width).requires_grad_())
        assert torch.equal(answer, plain)
        assert not answer.requires_grad


def test_a_gradient_goes_through_the_warpers():
    """As through transformers' own: of the kept scores, none of the others."""
    _, scores = inputs(2, 5, 50)
    scores.requires_grad_()
    warped = LlamaTopPLogitsWarper(0.9)(None, LlamaTemperatureLogitsWarper(0.5)(None, scores))
    kept = warped > -torch.inf
    warped[kept].sum().backward()
    assert torch.equal(scores.grad, kept * 2.0)


def test_sample_top_p_takes_what_requires_grad():
    """Contiguous or not."""
    probs = torch.softmax(torch.randn(3, 40), -1)
    for layout in (lambda p: p, lambda p: p.t().contiguous().t()):
        one, other = (torch.Generator().manual_seed(5) for _ in range(2))
        expected = sample_top_p(layout(probs), 0.9, generator=one)
        assert torch.equal(sample_top_p(layout(probs).requires_grad_(), 0.9, generator=other), expected)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
@pytest.mark.parametrize("kind", MAKERS)
def test_copies_answer_as_the_original(kind, copied):
    """Made before or after a first call; a copied generator stands where the original's stood."""
    original, (ids, scores) = MAKERS[kind](), inputs(3, 5, 900)
    for _ in range(2):
        twin = copied(original)
        torch.manual_seed(4)
        state = original.generator.get_state() if kind == "generator" else None
        answer = original(ids, scores)
        torch.manual_seed(4)
        if kind == "generator" and copied is copy.copy:
            original.generator.set_state(state)  # a shallow copy draws from the very same generator
        assert torch.equal(twin(ids, scores), answer)


@pytest.mark.parametrize("kind", ["greedy", "seeds", "temperature", "top_p"])
def test_threads_share_an_object(kind):
    """Two threads with batches of other sizes, at other columns, get what each gets alone."""
    used = MAKERS[kind]()
    work = [
        [inputs(rows, columns, 700, seed=columns) for columns in range(first, first + 40)]
        for rows, first in ((2, 3), (5, 60))
    ]
    alone = [[MAKERS[kind]()(*step) for step in steps] for steps in work]
    found, start = [[], []], threading.Barrier(2)

    def run(which):
        start.wait()
        found[which] += [used(*step) for step in work[which]]

    threads = [threading.Thread(target=run, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, expected in zip(found, alone, strict=True):
        assert len(mine) == len(expected)
        assert all(map(torch.equal, mine, expected))


def test_threads_on_one_generator_draw_each_block_once():
    """Which thread gets which numbers is theirs to settle; every draw is a kept token, and as many blocks are drawn."""
    generator, plain = (torch.Generator().manual_seed(6) for _ in range(2))
    sampler = LlamaSampler(1.0, 0.9, generator=generator)
    ids, scores = inputs(4, 5, 600)
    kept = LlamaTopPLogitsWarper(0.9)(None, scores) > -torch.inf
    answers = []

    def run():
        answers.extend(sampler(ids, scores) for _ in range(30))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 60
    assert all(kept.gather(1, answer.argmax(-1, keepdim=True)).all() for answer in answers)
    for _ in range(60):
        torch.empty(4, 600).exponential_(generator=plain)
    assert torch.equal(generator.get_state(), plain.get_state())


@pytest.mark.parametrize("kind", ["greedy", "seeds", "generator", "global generator"])
def test_other_devices_draw_the_same_tokens(monkeypatch, kind):
    """The path that never reads a tensor on the host; several columns, so that noise computed ahead is used."""
    draws = []
    for elsewhere in (False, True):
        with monkeypatch.context() as patch:
            if elsewhere:
                as_on_another_device(patch)
                assert not fast_path.on_cpu(torch.zeros(1))
            torch.manual_seed(9)
            sampler = MAKERS[kind]()
            draws.append([sampler(*inputs(3, column, 1500, seed=column)) for column in [*range(60, 70), 4, 5, 200]])
    assert all(map(torch.equal, *draws))


def test_a_generator_of_another_device_is_refused():
    """In one sentence, at the first call, since only then the logits' device is known."""

    class Elsewhere:
        device = torch.device("cuda", 0)

        def initial_seed(self):
            return 0

    with pytest.raises(ValueError, match="generator must live on the model's device cpu, got one on cuda:0"):
        LlamaSampler(generator=Elsewhere())(*inputs(1, 3, 9))
    with pytest.raises(ValueError, match="generator must live on the model's device cpu, got one on cuda:0"):
        sample_top_p(torch.ones(1, 2) / 2, 0.9, generator=Elsewhere())
