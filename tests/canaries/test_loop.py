"""What this package relies on in transformers' own loop: a release that changes one of these says which by a test here.

Nothing of the package runs in these tests. Each names the module that would have to change.
"""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, TemperatureLogitsWarper, TopPLogitsWarper

from tests.canaries.helpers import IDS, Always, Recorder, greedy, padded_ids


def test_its_own_warpers_come_after_the_callers(plain):
    """The pages on warpers: a caller's processors see raw logits, and transformers' warpers act on what they return."""
    seen = []

    class Looker(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores)
            return scores

    out = plain.generate(
        IDS,
        max_new_tokens=1,
        do_sample=True,
        temperature=0.5,
        top_k=0,
        logits_processor=[Looker(), TemperatureLogitsWarper(0.5)],
        output_scores=True,
        return_dict_in_generate=True,
    )
    torch.testing.assert_close(out.scores[0], seen[0] / 0.25)  # both temperatures act


def test_a_sampled_call_adds_top_k_50(plain):
    """The pages on warpers: `top_k=0` has to be said."""
    config = {"max_new_tokens": 1, "do_sample": True, "output_scores": True, "return_dict_in_generate": True}
    assert int(plain.generate(IDS, **config).scores[0].isfinite().sum()) == 50
    assert bool(plain.generate(IDS, top_k=0, **config).scores[0].isfinite().all())


def test_its_nucleus_is_another():
    """The pages on warpers: of [.5, .25, .25] with p = .5 transformers keeps one token, LLAMA2 two."""
    kept = TopPLogitsWarper(0.5)(None, torch.tensor([[0.5, 0.25, 0.25]]).log()).isfinite()
    assert kept.tolist() == [[True, False, False]]


def test_a_one_hot_row_is_the_token(plain):
    """`generation/loop.py`: greedy search takes what the last processor says, and processors get float32 scores."""
    always = Always(7)
    assert greedy(plain, logits_processor=[always]).sequences[0, IDS.shape[1] :].tolist() == [7, 7, 7]
    assert always.dtypes == {torch.float32}


def test_a_criterion_ends_rows_and_finished_ones_go_on(plain):
    """`generation/loop.py`: without an EOS id a finished row gets no pad, and the loop ends when all rows are done."""
    calls = []

    class FirstRowAtOnce(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            calls.append(input_ids.shape[1])
            return torch.tensor([True, input_ids.shape[1] >= 6])

    ids = IDS.repeat(2, 1)
    out = greedy(plain, ids, steps=8, logits_processor=[Always(7)], stopping_criteria=[FirstRowAtOnce()])
    assert out.sequences[:, 3:].tolist() == [[7, 7, 7]] * 2
    assert calls == [4, 5, 6]


def test_a_fresh_config_knows_no_eos(plain):
    """`generation/view.py`: with GenerationConfig() on the model, EOS ids of the checkpoint end nothing."""
    assert greedy(plain, logits_processor=[Always(2)]).sequences[0].tolist() == [*IDS[0].tolist(), 2, 2, 2]


def test_every_forward_goes_through_the_class_call(plain):
    """`generation/view.py`: an observer stands in `__call__`, and gets keywords alone."""
    recorder = Recorder.of(plain)
    greedy(recorder)
    assert [call["input_ids"].shape[1] for call in recorder.calls] == [3, 1, 1]
    assert all(not call["args"] for call in recorder.calls)


def test_a_prefill_asks_for_the_last_logits_alone(plain):
    """`generation/scoring.py`: `logits_to_keep=1` is a keyword of the forward, which an observer may raise."""
    recorder = Recorder.of(plain)
    greedy(recorder)
    assert recorder.calls[0]["logits_to_keep"] == 1


def test_a_cache_handed_over_is_not_read_again(plain):
    """`generation/sharing.py`, `generation/walk.py`: full ids with a cache forward the rest, with the same tokens."""
    name = Recorder.cache_name()
    prefix = greedy(plain, IDS[:, :2], steps=1)
    recorder = Recorder.of(plain)
    out = greedy(recorder, **{name: prefix[name]})
    assert recorder.calls[0]["input_ids"].tolist() == IDS[:, 2:].tolist()
    assert torch.equal(out.sequences, greedy(plain).sequences)


def test_a_mask_gives_the_positions(plain):
    """`generation/schedule.py`: behind masked padding a row's logits are those of the row alone."""
    ids, mask = padded_ids(4)
    alone = greedy(plain, output_logits=True).logits
    padded = greedy(plain, ids, attention_mask=mask, output_logits=True).logits
    torch.testing.assert_close(torch.stack(padded), torch.stack(alone), rtol=0, atol=1e-4)


def test_a_prefill_is_cut_into_chunks(plain):
    """`generation/scoring.py`: `prefill_chunk_size` bounds each forward, and the tokens are the same."""
    recorder = Recorder.of(plain)
    out = greedy(recorder, prefill_chunk_size=2)
    assert [call["input_ids"].shape[1] for call in recorder.calls[:2]] == [2, 1]
    assert torch.equal(out.sequences, greedy(plain).sequences)


def test_chunks_go_on_from_a_cache(plain):
    """`generation/sharing.py` with `generation/scoring.py`: what a cache holds is not read again in chunks."""
    name = Recorder.cache_name()
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 10]])
    prefix = greedy(plain, ids[:, :3], steps=1)
    recorder = Recorder.of(plain)
    out = greedy(recorder, ids, prefill_chunk_size=2, **{name: prefix[name]})
    assert [call["input_ids"].tolist() for call in recorder.calls[:2]] == [[[7, 8]], [[9, 10]]]
    assert torch.equal(out.sequences, greedy(plain, ids).sequences)


def test_processors_share_their_tensor_with_output_logits(plain):
    """`sampling/processors.py`: a processor that worked in place would change the raw logits that are handed out."""

    class InPlace(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.fill_(3.0)

    assert bool((greedy(plain, logits_processor=[InPlace()], output_logits=True).logits[0] == 3.0).all())


def test_a_streamer_gets_the_prompt_and_then_each_token(plain):
    """`generation/streamers.py`, `llama/streaming.py`: put(prompts), put(tokens of a step) and one end()."""
    heard = []

    class Listener:
        def put(self, value):
            heard.append(tuple(value.shape))

        def end(self):
            heard.append("end")

    greedy(plain, streamer=Listener())
    assert heard == [(1, 3), (1,), (1,), (1,), "end"]


def test_nothing_to_generate_is_refused(plain):
    """`generation/loop.py`: `max_new_tokens=0` needs a path of its own."""
    with pytest.raises(ValueError, match="max_new_tokens"):
        greedy(plain, steps=0)


def test_an_oserror_means_that_there_is_no_custom_code(plain):
    """`generation/mixin.py`: `load_custom_generate` may raise it, and nothing of a checkpoint runs."""
    asked = []

    class Refusing(type(plain)):
        def load_custom_generate(self, *args, **kwargs):
            asked.append(args)
            raise OSError("none")

    model = Refusing(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(greedy(model).sequences, greedy(plain).sequences)


def test_a_fresh_config_says_nothing_about_sampling():
    """`generation/options.py`: fields that equal GenerationConfig()'s count as unset, and a fresh one sets few."""
    fresh = GenerationConfig().to_dict()
    sampling = ("do_sample", "temperature", "top_p", "top_k", "min_p", "num_beams", "max_length", "max_new_tokens")
    assert {name: fresh.get(name) for name in sampling} == dict.fromkeys(sampling)
