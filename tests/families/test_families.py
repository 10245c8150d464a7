"""The promises of one row's independence on every family: a row is its own, whatever stands beside it or is asked for.

A case holds, or it is refused by name where nothing is right (`REFUSED`), or it is a known failure (`KNOWN`), which is
strict: remove an entry together with its bug.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from hf_llama_sampling import PromptCache
from hf_llama_sampling.llama.reference_model import with_reference_interface
from hf_llama_sampling.reference import reference_generate
from tests.families.expected import KNOWN, REFUSED, REFUSED_AT_ALL
from tests.families.zoo import CACHES, CONTEXT, EOS, FAMILIES, build, build_ours, plain_logits, rounding

pytestmark = pytest.mark.slow

# Short, in between and long; a window of 6 and a first context of 16 are crossed in prompts and in completions.
PROMPTS = [[1, 5, 6], [1, *range(60, 72)], [1, *range(7, 25)]]
NEW, SEED = 6, 7
DRAWS = {"greedy": {"temperature": 0}, "seeded": {"temperature": 0.9, "top_p": 0.95}}


def families(test: str, names: Sequence[str] = tuple(FAMILIES)) -> Any:
    """Families for one test, known failures marked."""
    known = KNOWN.get(test, {})
    return pytest.mark.parametrize(
        "family",
        [
            pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason=known[name])] if name in known else [])
            for name in names
            if name not in REFUSED_AT_ALL
        ],
    )


def unless_refused(family: str, things: str, call: Callable[..., Any], *given: Any, **asked: Any) -> Any:
    """What the call gives; None where the family is refused one of the things, in one sentence."""
    refused = REFUSED.get(family, {})
    sentences = [refused[thing] for thing in things.split() if thing in refused]
    if not sentences:
        return call(*given, **asked)
    with pytest.raises(ValueError, match="|".join(sentences)):
        call(*given, **asked)
    return None


def ask(family: str, rows: Sequence[int], draw: str = "seeded", **asked: Any) -> Any:
    """`generate` for some of PROMPTS, with one seed per prompt unless greedy."""
    seeds = {} if draw == "greedy" else {"seeds": [SEED + row for row in rows]}
    defaults = {"max_gen_len": NEW, "max_seq_len": CONTEXT, "return_dict_in_generate": True}
    model = asked.pop("model", None) or build_ours(family)
    return model.generate([PROMPTS[row] for row in rows], **defaults | DRAWS[draw] | seeds | asked)


@functools.cache
def alone(family: str, row: int, draw: str = "seeded") -> list[int]:
    """The completion of one prompt by itself, its EOS not included."""
    return ask(family, [row], draw).tokens[0]


def close(family: str, tokens: Sequence[int], found: Sequence[float], expected: Sequence[float]) -> None:
    """Logprobs of the same text, computed in two ways."""
    assert len(found) == len(expected) == len(tokens)
    if not tokens:
        return
    apart = max((abs(a - b) for a, b in zip(found, expected, strict=True)))
    assert apart <= rounding(build(family), tokens)


@functools.cache
def own_run(family: str, row: int, **asked: Any) -> tuple[list[int], list[float]]:
    """Prompt and greedy completion, cut before EOS, and their logprobs, by transformers alone on a fresh model."""
    prompt = PROMPTS[row]
    model = copy.deepcopy(build(family))
    out = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=NEW,
        output_logits=True,
        return_dict_in_generate=True,
        **asked,
    )
    made = out.sequences[0, len(prompt) :].tolist()
    made = made[: made.index(EOS)] if EOS in made else made
    steps = [float(torch.log_softmax(logits[0].float(), -1)[token]) for logits, token in zip(out.logits, made)]  # noqa: B905
    return prompt + made, forward_logprobs(family, prompt) + steps


def forward_logprobs(family: str, tokens: Sequence[int]) -> list[float]:
    """One plain forward: each token's logprob given those before it, 0.0 for the first."""
    table = torch.log_softmax(plain_logits(build(family), tokens), dim=-1)
    return [0.0] + [float(table[place, token]) for place, token in enumerate(tokens[1:])]


class Collector(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        """Prompts first, then one id per row and step."""
        self.pieces.append(value)

    def end(self) -> None:
        """Nothing is held back."""


@pytest.mark.parametrize("family", REFUSED_AT_ALL)
def test_other_positions_are_refused_by_name(family):
    """A model that the loop would tell other positions than its own forward counts generates and scores nothing."""
    model = build_ours(family)
    for call in (
        lambda: model.generate(PROMPTS, max_gen_len=NEW, seeds=1),
        lambda: model.score_tokens(PROMPTS),
        lambda: model.score_continuations(PROMPTS, [[[5]]] * 3),
    ):
        with pytest.raises(ValueError, match=f"{type(model).__name__} counts the positions"):
            call()


@families("greedy_is_transformers_own")
def test_greedy_is_transformers_own(family):
    """A greedy row alone is what transformers' own greedy `generate` makes of it on a model fresh from its config."""
    for prompt in PROMPTS:
        prompt = torch.tensor([prompt])
        own = copy.deepcopy(build(family)).generate(prompt, do_sample=False, max_new_tokens=NEW)
        ours = build_ours(family).generate(prompt, temperature=0, max_gen_len=NEW, max_seq_len=CONTEXT)
        assert ours.tolist() == own.tolist()


@families("a_row_is_what_it_is_alone")
def test_a_row_is_what_it_is_alone(family):
    """Short, in between and long prompts in one batch give each one's own tokens, in every schedule."""
    for draw in DRAWS:
        expected = [alone(family, row, draw) for row in range(3)]
        for schedule in ("reference", "padded", "auto"):
            out = unless_refused(family, schedule, ask, family, range(3), draw, schedule=schedule)
            assert out is None or out.tokens == expected, (schedule, draw)


@families("a_batch_of_one_length")
def test_a_batch_of_one_length(family):
    """Prompts of one length need no padding, and give each one's own tokens."""
    prompts = [PROMPTS[1], PROMPTS[1][::-1], PROMPTS[1]]
    settings = {"max_gen_len": [NEW, NEW, 3], "max_seq_len": CONTEXT, "temperature": 0}
    out = build_ours(family).generate(prompts, **settings)
    for row, prompt in enumerate(prompts):
        limit = settings["max_gen_len"][row]
        assert out.tokens[row] == build_ours(family).generate([prompt], **settings | {"max_gen_len": limit}).tokens[0]


@families("copies_and_limits_per_row")
def test_copies_and_limits_per_row(family):
    """Two copies of each prompt under limits of 6, 2 and 4: the first copy is the prompt alone, as far as it goes."""
    limits = [6, 2, 4]
    for schedule in ("reference", "padded"):
        asked = {"schedule": schedule, "max_gen_len": limits, "num_return_sequences": 2}
        out = unless_refused(family, schedule, ask, family, range(3), **asked)
        if out is not None:
            assert out.tokens[::2] == [alone(family, row)[:limit] for row, limit in enumerate(limits)], schedule


@families("scores_are_those_of_a_forward")
def test_scores_are_those_of_a_forward(family):
    """`score_tokens` of a ragged batch: log_softmax of one plain forward per row."""
    out = unless_refused(family, "scores", build_ours(family).score_tokens, PROMPTS)
    if out is not None:
        for tokens, logprobs in zip(PROMPTS, out.logprobs, strict=True):
            close(family, tokens, logprobs, forward_logprobs(family, tokens))


@families("logprobs_are_those_of_the_models_own_run")
def test_logprobs_are_those_of_the_models_own_run(family):
    """Echoed logprobs are a plain forward's, generated ones transformers' own greedy run's, alone or in a batch."""
    for schedule, rows in (("auto", [0]), ("auto", [1]), ("auto", [2]), ("reference", range(3)), ("padded", range(3))):
        thing = f"echo {schedule}" if len(rows) > 1 else "echo"
        asked = {"schedule": schedule, "echo": True, "logprobs": True}
        out = unless_refused(family, thing, ask, family, rows, "greedy", **asked)
        for place, row in enumerate(rows if out else []):
            tokens, logprobs = own_run(family, row)
            assert out.tokens[place] == tokens, (schedule, rows)
            close(family, tokens, out.logprobs[place], logprobs)


@families("chunks_score_as_a_whole")
def test_chunks_score_as_a_whole(family):
    """Column by column (`chunk_bytes=1`), scores are those of one chunk."""
    pieces = unless_refused(family, "chunks", build_ours(family).score_tokens, PROMPTS, chunk_bytes=1)
    if pieces is not None:
        whole = build_ours(family).score_tokens(PROMPTS)
        for row, tokens in enumerate(PROMPTS):
            close(family, tokens, pieces.logprobs[row], whole.logprobs[row])


@families("chunks_generate_as_a_whole")
def test_chunks_generate_as_a_whole(family):
    """With echo, logprobs and the prompts read column by column, tokens and logprobs stay."""
    for schedule in ("reference", "padded"):
        asked = {"schedule": schedule, "echo": True, "logprobs": True, "chunk_bytes": 1}
        out = unless_refused(family, f"{schedule} chunks", ask, family, range(3), "greedy", **asked)
        for row in range(3 if out else 0):
            tokens, logprobs = own_run(family, row)
            assert out.tokens[row] == tokens, schedule
            close(family, tokens, out.logprobs[row], logprobs)


@families("a_call_leaves_no_state")
def test_a_call_leaves_no_state(family):
    """After a ragged batch, after a long prompt, and after scoring, a short prompt is answered and scored as before."""
    tokens, logprobs = own_run(family, 0)
    model = build_ours(family)
    for before in (range(3), [2]):
        ask(family, before, "greedy", model=model)
        asked = {"model": model, "echo": True, "logprobs": True}
        out = unless_refused(family, "echo", ask, family, [0], "greedy", **asked)
        if out is not None:
            assert out.tokens[0] == tokens
            close(family, tokens, out.logprobs[0], logprobs)


# Two of three prompts with a common beginning are equal; it is longer than any window.
HEAD = PROMPTS[2][:16]
SHARED = [[*HEAD, 60, 61], [*HEAD, 70, 71, 72], [*HEAD, 60, 61]]


@families("sharing_changes_nothing", CACHES)
def test_sharing_changes_nothing(family):
    """Prompts with a common beginning, two of them equal, are answered and scored as without sharing."""
    echoes = "echo" not in REFUSED.get(family, {})
    for schedule in ("reference", "padded"):
        asked = {"schedule": schedule, "seeds": SEED, "max_gen_len": NEW, "max_seq_len": CONTEXT}
        asked |= {"echo": echoes, "logprobs": echoes}
        apart, shared = (
            unless_refused(family, schedule, build_ours(family).generate, SHARED, share_prefix=share, **asked)
            for share in (False, True)
        )
        assert (apart and apart.tokens) == (shared and shared.tokens), schedule
        for row in range(3 if echoes and shared else 0):
            close(family, shared.tokens[row], shared.logprobs[row], apart.logprobs[row])


@families("scores_share_beginnings", CACHES)
def test_scores_share_beginnings(family):
    """Texts and continuations with a common beginning are scored as by one plain forward each."""
    continuations = [[[60, 61, 62], [70, 71]], [[60], [71, 72, 73]]]
    texts = unless_refused(family, "scores", build_ours(family).score_tokens, SHARED)
    choices = unless_refused(family, "scores", build_ours(family).score_continuations, [HEAD, HEAD[:9]], continuations)
    for tokens, logprobs in zip(SHARED, texts.logprobs if texts else (), strict=bool(texts)):
        close(family, tokens, logprobs, forward_logprobs(family, tokens))
    for context, some, found in zip([HEAD, HEAD[:9]], continuations, choices.logprobs if choices else ()):  # noqa: B905
        for tokens, logprobs in zip(some, found, strict=True):
            close(family, tokens, logprobs, forward_logprobs(family, context + tokens)[len(context) :])


@families("a_callers_cache_and_chunks", CACHES)
def test_a_callers_cache_and_chunks(family):
    """A cache of a prompt's beginning, or chunks of it, that the call names: the same tokens, or refused by name."""
    for held in (PROMPTS[2][:-1], PROMPTS[2][:10]):
        asked = {"max_gen_len": 1, "max_seq_len": CONTEXT, "temperature": 0, "return_dict_in_generate": True}
        begun = build_ours(family).generate([held], **asked)
        cache = begun.get("past_key_values")
        if cache is not None:
            right_or_refused(family, past_key_values=cache)
    right_or_refused(family, prefill_chunk_size=5)


def right_or_refused(family: str, **more: Any) -> None:
    """The tokens of the longest prompt alone, or one sentence that names the option."""
    try:
        out = ask(family, [2], "greedy", **more)
    except (TypeError, ValueError) as error:
        assert next(iter(more)) in str(error) and family not in ("llama", "mistral", "gpt2", "bloom")
    else:
        assert out.tokens == [alone(family, 2, "greedy")]


@families("start_pos_goes_on", [*CACHES, *REFUSED_AT_ALL])
def test_start_pos_goes_on(family):
    """`forward(tokens, start_pos)` in pieces and token by token: the logits of a plain forward over all so far."""
    text = PROMPTS[2]
    for sizes in ([5, 1, 1, 1, 4, 7], [1] * 12):
        model, at = with_reference_interface(copy.deepcopy(build(family)), SimpleNamespace(max_seq_len=CONTEXT)), 0
        for size in sizes:
            found = model.forward(torch.tensor([text[at : at + size]]), at)
            at += size
            expected = plain_logits(build(family), text[:at])[-size:]
            assert float((found[0] - expected).abs().max()) <= rounding(build(family), text[:at])


# transformers' own loop refuses these behind such a wrapper: they take nothing that is not spelled out.
SPELLED_OUT = """xlnet openai-gpt xlm rwkv ctrl bamba falcon_h1 nemotron_h zamba2 gemma3""".split()  # noqa: SIM905


@families("a_hidden_signature_changes_nothing", [name for name in CACHES if name not in SPELLED_OUT])
def test_a_hidden_signature_changes_nothing(family):
    """A wrapper that spells out no argument leaves greedy tokens and their logprobs, whatever else is asked for.

    transformers' loop then gives no positions, so a model that took them from the loop runs without padding.
    """
    model = build_ours(family)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    expected = [alone(family, row, "greedy") for row in (0, 2)]
    for more in ({"top_logprobs": 2}, {"echo": True, "logprobs": True}):
        thing = "echo" if "echo" in more else ""
        out = unless_refused(family, thing, ask, family, [0, 2], "greedy", model=model, **more)
        before = [len(PROMPTS[row]) if thing else 0 for row in (0, 2)]
        assert out is None or [row[start:] for row, start in zip(out.tokens, before, strict=True)] == expected


MORE: dict[str, Callable[[], dict[str, Any]]] = {
    "logprobs": lambda: {"logprobs": True},
    "top_logprobs": lambda: {"top_logprobs": 3},
    "hidden_states": lambda: {"output_hidden_states": True},
    "attentions": lambda: {"output_attentions": True},
    "logits": lambda: {"output_logits": True},
    "streamer": lambda: {"streamer": Collector()},
}


@families("asking_for_more_changes_no_token")
def test_asking_for_more_changes_no_token(family):
    """Of logprobs, hidden states, attentions, logits and a streamer no token depends."""
    for name, more in MORE.items():
        out = unless_refused(family, name, ask, family, [1], **more())
        assert out is None or out.tokens == [alone(family, 1)], name


@families("without_a_cache")
def test_without_a_cache(family):
    """`use_cache=False` gives what transformers' own greedy `generate` gives without one."""
    tokens, _ = own_run(family, 1, use_cache=False)
    assert ask(family, [1], "greedy", use_cache=False, echo=True).tokens == [tokens]


def shapes(value: Any) -> Any:
    """The nested shapes of an extra output; caches count as present."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return [shapes(item) for item in value] if isinstance(value, (tuple, list)) else type(value).__name__


@families("extras_do_not_depend_on_echo", ["llama", "gpt2", "gemma2", "bamba", "mamba", "qwen2_vl", "chameleon"])
def test_extras_do_not_depend_on_echo(family):
    """Hidden states, attentions, logits and caches come in one form, with and without echo and logprobs."""
    wanted = {"output_hidden_states": True, "output_attentions": family != "mamba", "output_logits": True}
    plain = ask(family, [1], **wanted)
    echoed = ask(family, [1], **wanted, echo=True, logprobs=True)
    names = ("logits", "attentions", "hidden_states", "past_key_values")
    assert {name: shapes(plain.get(name)) for name in names} == {name: shapes(echoed.get(name)) for name in names}


# Models that the plain loop cannot run: no cache by position, none without `generate`, one that `generate` drops.
NOT_IN_THE_PLAIN_LOOP = """bamba bert_not_causal falcon_mamba llama_dynamic mamba mamba2 openai-gpt phi3_longrope
recurrent_gemma rwkv xlm xlnet xlstm""".split()  # noqa: SIM905


@families("metas_stream_is_the_reference_loops", [name for name in FAMILIES if name not in NOT_IN_THE_PLAIN_LOOP])
def test_metas_stream_is_the_reference_loops(family):
    """Prompts of one length on Meta's stream: the plain loop's tokens and logprobs."""
    prompts = [PROMPTS[1], PROMPTS[1][::-1]]
    settings = {"max_gen_len": NEW, "temperature": 0.9, "top_p": 0.95, "logprobs": True, "max_seq_len": CONTEXT}
    stream = torch.Generator().manual_seed(SEED)
    tokens, logprobs = reference_generate(build(family), prompts, eos_ids=[EOS], generator=stream, **settings)
    out = build_ours(family).generate(prompts, generator=torch.Generator().manual_seed(SEED), **settings)
    assert out.tokens == tokens
    for row in range(2):
        close(family, tokens[row], out.logprobs[row], logprobs[row])


@families("a_turn_goes_on_from_the_last_ones_cache")
def test_a_turn_goes_on_from_the_last_ones_cache(family):
    """Two rows and turns with a `PromptCache`: tokens and logprobs as from scratch, whatever a family's caches are."""
    cache, prompts = PromptCache(), [PROMPTS[0], PROMPTS[1]]
    for _ in range(2):
        asked = {"max_gen_len": 4, "max_seq_len": CONTEXT, "seeds": SEED, "eos_token_id": [], "logprobs": True}
        plain = build_ours(family).generate(prompts, **asked)
        out = build_ours(family).generate(prompts, **asked, prompt_cache=cache)
        assert out.tokens == plain.tokens
        for row in range(2):
            bound = rounding(build(family), [*prompts[row], *out.tokens[row]])
            assert out.logprobs[row] == pytest.approx(plain.logprobs[row], abs=bound)
        prompts = [[*prompt, *answer, 9, 8, 7] for prompt, answer in zip(prompts, out.tokens, strict=True)]
