"""Options and processors that edit logits, and stopping criteria."""

import math

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import LogitsProcessor, StoppingCriteria

from hf_llama_sampling import LlamaGenerationMixin
from tests.bounds import ROUNDING
from tests.generation.helpers import BOS, EOS, LONG, OFTEN, RAGGED, SHORT, at, close, plain_logprobs

pytestmark = pytest.mark.slow


def test_repetition_penalty(tiny_model):
    """It edits the logits before the draw, and the completion's logprobs are those of the edited logits."""
    out = tiny_model.generate([SHORT], max_gen_len=12, temperature=0, repetition_penalty=1.8, logprobs=True, echo=True)
    plain = tiny_model.generate([SHORT], max_gen_len=12, temperature=0)
    assert out.tokens[0][3:] != plain.tokens[0]
    row = out.tokens[0]
    with torch.no_grad():
        logits = tiny_model(torch.tensor([row])).logits[0]
    for position in range(3, len(row)):
        seen = torch.tensor(sorted(set(row[:position])))
        edited = logits[position - 1].clone()
        edited[seen] = torch.where(edited[seen] > 0, edited[seen] / 1.8, edited[seen] * 1.8)
        assert row[position] == int(edited.argmax())
        assert out.logprobs[0][position] == pytest.approx(
            float(edited.log_softmax(-1)[row[position]]), abs=1.8 * ROUNDING
        )
    close([out.logprobs[0][:3]], tiny_model.score_tokens([SHORT]).logprobs)  # the prompt's are raw


EDITING = [
    {"repetition_penalty": 1.6},
    {"encoder_repetition_penalty": 1.6},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 2},
    {"bad_words_ids": [[OFTEN], [13, 5]]},
    {"sequence_bias": [[[OFTEN], -5.0], [[5, 6], 4.0]]},
    {"suppress_tokens": [OFTEN, 13]},
    {"begin_suppress_tokens": [OFTEN, 13, 17]},
    {"guidance_scale": 1.5},
    {"guidance_scale": 1.5, "use_cache": False},
    {"min_length": 9},
    {"min_new_tokens": 5},
    {"exponential_decay_length_penalty": (2, 1.4)},
    {"forced_bos_token_id": 40},
    {"forced_eos_token_id": EOS},
    {"remove_invalid_values": True},
    {"logits_processor": [transformers.TopKLogitsWarper(3)]},
    {"logits_processor": [transformers.RepetitionPenaltyLogitsProcessor(1.6)]},
    {"logits_processor": [transformers.NoRepeatNGramLogitsProcessor(2)]},
    {"prefix_allowed_tokens_fn": lambda batch, ids: [5, 6, 7, EOS, int(ids[-1]) + 1]},
]


def name_of(editing):
    """The names of its options, for the test's id."""
    return ", ".join(name if name != "logits_processor" else type(editing[name][0]).__name__ for name in editing)


@pytest.mark.parametrize("limits", [10, [3, 10, 6, 4]], ids=["one limit", "limits per row"])
@pytest.mark.parametrize("editing", EDITING, ids=name_of)
def test_editing_options_do_not_let_rows_see_each_other(tiny_model, editing, limits):
    """Same seed and prompt, ragged, with limits per row: a row is what it is alone, logprobs and reason too."""
    prompts = [*RAGGED, [BOS]]
    asked = {"temperature": 1.0, "logprobs": True, "echo": True, "eos_token_id": [EOS, OFTEN], **editing}
    batches = [
        tiny_model.generate(prompts, seeds=1, schedule=schedule, max_gen_len=limits, **asked)
        for schedule in ("reference", "padded")
    ]
    for row, prompt in enumerate(prompts):
        limit = limits if isinstance(limits, int) else limits[row]
        alone = tiny_model.generate([prompt], seeds=1 + row, max_gen_len=limit, **asked)
        for batch in batches:
            assert alone.tokens[0] == batch.tokens[row]
            assert alone.finish_reason[0] == batch.finish_reason[row]
            close(alone.logprobs, batch.logprobs[row : row + 1])


@pytest.mark.parametrize("editing", EDITING, ids=name_of)
def test_editing_options_mean_what_they_mean_to_transformers(tiny_model, editing):
    """Greedy, one row: the tokens of transformers' own generate, which has the EOS ids in hand."""
    ids = torch.tensor([LONG])
    asked = {"eos_token_id": [EOS, OFTEN], "do_sample": False, "max_new_tokens": 10, **editing}
    theirs = super(LlamaGenerationMixin, tiny_model).generate(ids, pad_token_id=0, **asked)
    assert torch.equal(tiny_model.generate(ids, pad_token_id=0, **asked), theirs)


def test_a_forced_eos_stands_at_each_rows_own_limit(tiny_model):
    """`forced_eos_token_id` with a limit per row ends each row by it, as if it were alone."""
    asked = {"temperature": 0, "forced_eos_token_id": EOS}
    for schedule in ("reference", "padded"):
        out = tiny_model.generate([[1, 5, 6], [1, 300, 301]], max_gen_len=[3, 6], schedule=schedule, **asked)
        assert out.finish_reason == ["stop", "stop"]
        assert [len(row) for row in out.tokens] == [2, 5]


def test_eos_is_no_bad_word(tiny_model):
    """As in transformers: EOS in `bad_words_ids` is not forbidden, alone or beside others."""
    plain = tiny_model.generate([SHORT] * 4, max_gen_len=30, seeds=3, eos_token_id=[EOS, OFTEN])
    assert "stop" in plain.finish_reason
    for words in ([[EOS], [OFTEN]], [[EOS], [OFTEN], [1023, 1022]]):
        out = tiny_model.generate([SHORT] * 4, max_gen_len=30, seeds=3, eos_token_id=[EOS, OFTEN], bad_words_ids=words)
        assert out.tokens == plain.tokens


def test_copies_with_editing_options(tiny_model):
    """`num_return_sequences` copies are edited like rows of their own; the first is the prompt alone."""
    asked = {"max_gen_len": 8, "seeds": [4, 5, 6], "repetition_penalty": 1.5, "encoder_repetition_penalty": 1.2}
    out = tiny_model.generate(RAGGED, num_return_sequences=3, **asked)
    assert out.tokens[::3] == tiny_model.generate(RAGGED, **asked).tokens


# --- what belongs to the caller sees each row's own text ----------------------------------------------------------


class Watch(LogitsProcessor):
    """Note every text that is shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(scores)
        self.seen += input_ids.tolist()
        return scores


def shown(prompts, tokens, limits, *, after):
    """The texts that rows may be shown with: the prompt and each part of its completion before (or after) a token."""
    return {
        tuple(prompt + row[:count])
        for prompt, row, limit in zip(prompts, tokens, limits, strict=True)
        for count in range(after, min(len(row) + 1, limit + after))
    }


PROMPTS = [[1, 870, 988], [1, 300, 301, 302, 303, 304], [1, 870, 40]]


@pytest.mark.parametrize("prompts", [PROMPTS, [[1, 5, 6]] * 3], ids=["ragged", "even"])
@pytest.mark.parametrize("contract", [{"seeds": 3}, {}, {"temperature": 0}], ids=str)
@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_callers_see_each_rows_own_text(tiny_model, prompts, contract, schedule):
    """A constraint, a processor and a criterion: no padding, no half prompt, no row that is forced or finished."""
    asked, watch, criterion = [], Watch(), []

    def allow(row, ids):
        asked.append((row, tuple(ids.tolist())))
        return list(range(1024))

    def never(input_ids, scores, **kwargs):
        criterion.extend(map(tuple, input_ids.tolist()))
        return torch.zeros(len(input_ids), dtype=torch.bool)

    limits, eos = [4, 12, 9], list(range(2, 1024, 9))
    out = tiny_model.generate(
        prompts,
        max_gen_len=limits,
        schedule=schedule,
        eos_token_id=eos,
        prefix_allowed_tokens_fn=allow,
        logits_processor=[watch],
        stopping_criteria=[never],
        return_dict_in_generate=True,
        **contract,
    )
    assert "stop" in out.finish_reason
    before = shown(prompts, out.tokens, limits, after=0)
    assert {ids for _, ids in asked} == before
    for row, prompt in enumerate(prompts):
        own = [ids for which, ids in asked if which == row]
        steps = min(len(out.tokens[row]) + 1, limits[row])
        assert own == [tuple(prompt + out.tokens[row][:count]) for count in range(steps)]
    assert set(map(tuple, watch.seen)) == before
    ends = {tuple(prompt + row) for prompt, row in zip(prompts, out.tokens, strict=True)}
    whole = {ids if ids[:-1] not in ends else ids[:-1] for ids in criterion}  # with the EOS that ended it
    assert whole == before - set(map(tuple, prompts)) | ends


def test_processors_and_criteria_know_rows_by_their_place(tiny_model):
    """A row stands in its own place of every batch that it is shown in, whichever rows are shown beside it."""

    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            for row in range(len(scores)):
                scores = scores.clone()
                scores[row, :] = -math.inf
                scores[row, 100 + row] = 0
            return scores

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            counts = (input_ids == 100 + torch.arange(len(input_ids))[:, None]).sum(-1)
            return counts >= torch.arange(1, len(input_ids) + 1)

    for schedule in ("reference", "padded"):
        out = tiny_model.generate(
            PROMPTS, max_gen_len=9, seeds=1, schedule=schedule, logits_processor=[Only()], stopping_criteria=[After()]
        )
        assert out.tokens == [[100], [101] * 2, [102] * 3]


def test_nothing_allowed_is_named(tiny_model):
    """The row and the position; a row that is done is not asked."""
    with pytest.raises(ValueError, match="at least one token, but allows none for position 8 of row 1: return the EOS"):
        tiny_model.generate(
            PROMPTS,
            max_gen_len=4,
            seeds=1,
            eos_token_id=[],
            prefix_allowed_tokens_fn=lambda row, ids: [] if (row, len(ids)) == (1, 8) else [5],
        )
    out = tiny_model.generate(
        PROMPTS, max_gen_len=5, seeds=1, prefix_allowed_tokens_fn=lambda row, ids: [EOS] if len(ids) == 6 else [7]
    )
    assert out.tokens == [[7, 7, 7], [], [7, 7, 7]]


def test_stop_strings_see_no_padding(tiny_model, tiny_tokenizer):
    """A text that padding, or another row's, would complete does not stop a row."""
    prompts = [tiny_tokenizer(text).input_ids for text in ("ROMEO:\nWhat", "ROMEO", "JULIET:\nO Romeo, Romeo!")]
    asked = {"max_gen_len": 20, "seeds": 2, "stop_strings": ["the", "e "], "tokenizer": tiny_tokenizer}
    for schedule in ("reference", "padded"):
        batch = tiny_model.generate(prompts, schedule=schedule, **asked)
        for row, prompt in enumerate(prompts):
            alone = tiny_model.generate([prompt], **{**asked, "seeds": 2 + row})
            assert (alone.tokens[0], alone.finish_reason[0]) == (batch.tokens[row], batch.finish_reason[row])


def test_processors_with_a_state_for_the_batch_need_prompts_of_one_length(tiny_model):
    """Rows of a ragged batch begin at different times, so their state would mix; refused by name."""
    guidance = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor
    with pytest.raises(ValueError, match="UnbatchedClassifierFreeGuidanceLogitsProcessor keeps a state for a whole"):
        tiny_model.generate(RAGGED, max_gen_len=3, logits_processor=[guidance(1.5, tiny_model)])
    asked = {"max_gen_len": 3, "temperature": 0}
    guide, expected = guidance(1.5, tiny_model), tiny_model.generate([SHORT] * 2, guidance_scale=1.5, **asked).tokens
    for _ in range(2):  # its state does not go on in the next call
        assert tiny_model.generate([SHORT] * 2, logits_processor=[guide], **asked).tokens == expected


def test_a_processor_that_writes_to_its_scores_leaves_output_logits_raw(tiny_model):
    """transformers hands out the tensor that processors get; here they get a copy of it."""

    def forbid(input_ids, scores):
        scores[:, OFTEN] = -math.inf
        return scores

    asked = {"max_gen_len": 2, "temperature": 0, "output_logits": True, "return_dict_in_generate": True}
    out = tiny_model.generate([SHORT] * 2, logits_processor=[forbid], **asked)
    assert all(bool(logits.isfinite().all()) for logits in out.logits)


def test_a_processor_may_forbid_tokens(tiny_model):
    """-inf from a processor is its right; logprobs are of the edited logits, and the input is not touched."""

    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            allowed = torch.full_like(scores, -math.inf)
            allowed[:, [5, 6, 7]] = scores[:, [5, 6, 7]]
            return allowed

    for schedule in ("reference", "padded"):
        out = tiny_model.generate(
            RAGGED,
            max_gen_len=5,
            seeds=1,
            logprobs=True,
            top_logprobs=4,
            echo=True,
            logits_processor=[Only()],
            schedule=schedule,
            output_logits=True,
        )
        for row, prompt, scores, best in zip(out.tokens, RAGGED, out.logprobs, out.top_logprobs, strict=True):
            assert set(row[len(prompt) :]) <= {5, 6, 7}
            raw = plain_logprobs(tiny_model, row)[len(prompt) :, [5, 6, 7]].log_softmax(-1)
            close(
                [scores[len(prompt) :]],
                [[float(place[token - 5]) for place, token in zip(raw, row[len(prompt) :], strict=True)]],
            )
            close([scores[: len(prompt)]], [at(plain_logprobs(tiny_model, prompt), prompt)])
            assert best[-1][3][1] == -math.inf


def test_stop_strings_that_no_token_table_can_match_are_refused(tiny_model):
    """transformers spells each token after Latin letters; a vocabulary of whole words without them has no table."""
    words = Tokenizer(models.WordLevel({"\u4f60": 0, "\u597d": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    asked = {"max_gen_len": 2, "temperature": 0}
    with pytest.raises(ValueError, match=r"what each token spells.*substring not found.*take stream\(stop=\)"):
        tiny_model.generate([[0, 1]], stop_strings=["\u597d"], tokenizer=tokenizer, **asked)
    *_, end = tiny_model.stream(
        [[0, 1]], stop=["\u597d"], tokenizer=tokenizer, suppress_tokens=[0, *range(2, 1024)], **asked
    )
    assert end.stop_reason == "\u597d"


def test_stop_strings_and_criteria(tiny_model, tiny_tokenizer):
    """A stop string ends its row with `"stop"`, a criterion of the caller's ends rows one by one."""
    free = tiny_model.generate([SHORT] * 4, max_gen_len=30, seeds=3, eos_token_id=[])
    for schedule in ("reference", "padded"):
        out = tiny_model.generate(
            [SHORT] * 4,
            max_gen_len=30,
            seeds=3,
            stop_strings=["e"],
            tokenizer=tiny_tokenizer,
            eos_token_id=[],
            schedule=schedule,
        )
        for row, whole, why in zip(out.tokens, free.tokens, out.finish_reason, strict=True):
            assert row == whole[: len(row)]
            assert why == ("stop" if len(row) < 30 else "length")
            text = tiny_tokenizer.decode(row)
            assert ("e" in text) == (why == "stop")
            assert "e" not in tiny_tokenizer.decode(row[:-1])
    assert "stop" in out.finish_reason

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 5 + row for row in range(len(input_ids))])

    out = tiny_model.generate([SHORT] * 4, max_gen_len=4, seeds=3, stopping_criteria=[After()], eos_token_id=[])
    assert out.tokens == [whole[: min(4, 2 + row)] for row, whole in enumerate(free.tokens)]
    assert out.finish_reason == ["stop"] * 3 + ["length"]


@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_criteria_find_the_logits_of_the_step(tiny_model, schedule):
    """`scores[-1]` is what the last token was drawn from, after edits, whatever stands beside the row in the batch."""
    seen = []

    class Looks(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.extend(zip(input_ids.tolist(), scores[-1], strict=True))
            return False

    asked = {"max_gen_len": 3, "seeds": 3, "eos_token_id": [], "schedule": schedule, "suppress_tokens": [OFTEN]}
    tiny_model.generate(RAGGED, stopping_criteria=[Looks()], **asked)
    assert {len(text) for text, _ in seen} == {3, 4, 5, 6, 8, 9, 10}
    for text, logits in seen:
        expected = tiny_model(torch.tensor([text[:-1]])).logits[0, -1].detach()
        expected[OFTEN] = -math.inf
        torch.testing.assert_close(logits, expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_what_a_processor_remembers_is_of_its_own_rows(tiny_model, schedule):
    """Processors and criteria that remember the prompts' length, or count their calls, answer as for each row alone."""

    class EndsAfter(LogitsProcessor):
        """Forces an id from the third new token on, and another in every second call."""

        def __init__(self):
            self.begin, self.calls, self.of_row = None, 0, {}

        def __call__(self, input_ids, scores):
            self.begin = input_ids.shape[1] if self.begin is None else self.begin
            self.calls += 1
            self.of_row[0] = self.of_row.get(0, 0) + 1
            forced = 9 if input_ids.shape[1] - self.begin > 2 else 8 if self.calls % 2 == 0 else None
            assert self.of_row == {0: self.calls}
            return (
                scores if forced is None else torch.full_like(scores, -math.inf).index_fill(1, torch.tensor(forced), 0)
            )

    class AtNine(StoppingCriteria):
        def __init__(self):
            self.begin = None

        def __call__(self, input_ids, scores, **kwargs):
            self.begin = input_ids.shape[1] if self.begin is None else self.begin
            return (input_ids[:, self.begin :] == 9).sum(1) >= 2

    def made(prompts, seeds):
        asked = {"logits_processor": [EndsAfter()], "stopping_criteria": [AtNine()], "eos_token_id": []}
        return tiny_model.generate(prompts, max_gen_len=9, seeds=seeds, schedule=schedule, **asked).tokens

    assert made(RAGGED, [0, 1, 2]) == [made([prompt], [seed])[0] for seed, prompt in enumerate(RAGGED)]
