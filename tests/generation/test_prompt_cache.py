"""Turns of a conversation read only what is new, and answer as from scratch."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_llama_sampling import PromptCache, with_llama_generation
from hf_llama_sampling.generation.releases import CACHE_NAME
from tests.conftest import examples
from tests.generation.helpers import GROUPED, STREAMS, close
from tests.generation.test_prefix import Forwards
from tests.generation.test_sharing import WINDOWED

pytestmark = pytest.mark.slow

FIRST = [1, *range(40, 70)]
NEW = [*range(200, 212)]
ASKED = {"max_gen_len": 6, "eos_token_id": []}


def next_turn(prompts, out):
    """The prompts of the next turn: what was said, and something new."""
    return [[*prompt, *answer, *NEW] for prompt, answer in zip(prompts, out.tokens, strict=True)]


@pytest.fixture
def model(tiny_model):
    """A model of the test's own, whose trials of a first call are over."""
    model = copy.deepcopy(tiny_model)
    cache = PromptCache()
    for _ in range(2):
        model.generate([FIRST, FIRST[:9]], **ASKED, temperature=0, prompt_cache=cache, schedule="padded")
    return model


@pytest.mark.parametrize("stream", [name for name in STREAMS if name != "mixed"])
@pytest.mark.parametrize("logprobs", [False, True])
def test_a_turn_reads_what_is_new_and_answers_as_from_scratch(model, stream, logprobs):
    """Same tokens on both random-number contracts; 12 new tokens and the last of the answer, and 4 to see that the
    model is still the one that read the rest."""
    cache, prompts = PromptCache(), [FIRST]
    for turn in range(3):
        torch.manual_seed(turn)
        plain = model.generate(prompts, **ASKED, **STREAMS[stream], logprobs=logprobs)
        torch.manual_seed(turn)
        with Forwards(model) as forwards:
            out = model.generate(prompts, **ASKED, **STREAMS[stream], logprobs=logprobs, prompt_cache=cache)
        assert out.tokens == plain.tokens
        if logprobs:
            close(out.logprobs, plain.logprobs)
        read = [(1, 4), (1, 13)] if turn else [(1, 31)]
        assert forwards.shapes == read + 5 * [(1, 1)]
        prompts = next_turn(prompts, out)


@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_rows_of_several_conversations_go_on_together(model, schedule):
    """Prompts of 31, 21 and 9 tokens: in the padded layout 12 new ones and the last of the answer are read for each;
    in the reference's the shortest row went on beside the others, so the last of its answer is known."""
    cache, prompts = PromptCache(), [FIRST, FIRST[:21], FIRST[:9]]
    first = model.generate(prompts, **ASKED, seeds=1, schedule=schedule, prompt_cache=cache)
    prompts = next_turn(prompts, first)
    plain = model.generate(prompts, **ASKED, seeds=1, schedule=schedule, logprobs=True, share_prefix=False)
    with Forwards(model) as forwards:
        out = model.generate(
            prompts, **ASKED, seeds=1, schedule=schedule, logprobs=True, prompt_cache=cache, share_prefix=False
        )
    assert out.tokens == plain.tokens
    close(out.logprobs, plain.logprobs)
    assert forwards.shapes[:2] == [(1, 4), (3, 13 if schedule == "padded" else 12)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, **examples(15))
@given(
    calls=st.lists(
        st.lists(
            st.tuples(st.integers(0, 12), st.lists(st.integers(3, 5), max_size=4), st.integers(1, 2)),
            min_size=1,
            max_size=3,
        ),
        min_size=2,
        max_size=4,
    ),
    schedule=st.sampled_from(["auto", "reference", "padded"]),
    share=st.sampled_from([None, True, False]),
    most=st.sampled_from([0, 1 << 16, 1 << 30]),
)
def test_any_calls_answer_as_without(tiny_model, calls, schedule, share, most):
    """Random batches one after the other with one cache: equal rows, other numbers of rows, unrelated prompts."""
    cache = PromptCache(most)
    for call in calls:
        prompts = [[1, *range(50, 50 + common), *ids] for common, ids, copies in call for _ in range(copies)]
        asked = {"max_gen_len": 3, "seeds": 2, "logprobs": True, "schedule": schedule, "share_prefix": share}
        plain = tiny_model.generate(prompts, **asked)
        out = tiny_model.generate(prompts, **asked, prompt_cache=cache)
        assert out.tokens == plain.tokens
        close(out.logprobs, plain.logprobs)


def test_a_text_that_was_rewritten_is_read_from_the_first_token_that_differs(model):
    """20 of 31 tokens are as before: 11 are read, and one token at least where all are known."""
    for changed, read in (([*FIRST[:20], 500, *FIRST[21:]], 11), (FIRST[:25], 1)):
        cache = PromptCache()
        model.generate([FIRST], **ASKED, temperature=0, prompt_cache=cache)
        with Forwards(model) as forwards:
            out = model.generate([changed], **ASKED, temperature=0, prompt_cache=cache)
        assert forwards.shapes[:2] == [(1, 4), (1, read)]
        assert out.tokens == model.generate([changed], **ASKED, temperature=0).tokens


@torch.no_grad()
def in_place(model):
    """As an optimizer does it."""
    model.model.layers[1].mlp.up_proj.weight.mul_(1.5)


def uncounted(model):
    """Through `.data`, which torch's counter of changes does not see."""
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)


def loaded(model):
    """From a file."""
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


def replaced(model):
    """A layer of another object."""
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[0].mlp)
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def trained(model):
    """One step of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(input_ids=torch.tensor([FIRST]), labels=torch.tensor([FIRST])).loss.backward()
    optimizer.step()


def hooked(model):
    """A hook that steers a layer."""
    model.model.layers[0].register_forward_hook(lambda module, args, output: 1.3 * output)


def hooked_far_behind(model):
    """A hook that changes later positions alone, which the check of the first keys cannot see."""

    def steer(module, args, output):
        return torch.cat([output[:, :9], 1.5 * output[:, 9:]], 1)

    model.model.embed_tokens.register_forward_hook(steer)


def embedded_otherwise(model):
    """One token's embedding, through `.data`, as one sets those of added tokens."""
    model.model.embed_tokens.weight.data[FIRST[20]] *= -3


def scaled_a_little(model):
    """A number of a layer's, as an adapter's scale is one: in 16 bits below what rounding may be."""
    model.to(torch.bfloat16).generate([FIRST], **ASKED, prompt_cache=model.cache)
    model.model.layers[0].self_attn.scaling *= 1.05


def configured(model):
    """A window that the masks read from the config."""
    model.config.sliding_window = 4


def halved(model):
    """Another dtype."""
    model.to(torch.bfloat16)


CHANGES = [in_place, uncounted, loaded, replaced, trained, hooked, halved]
CHANGES += [hooked_far_behind, embedded_otherwise, scaled_a_little, configured]


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_reads_all_anew(model, change):
    """Whatever changes the model between two turns: the answer is the changed model's."""
    cache = model.cache = PromptCache()
    first = model.generate([FIRST], **ASKED, temperature=0, prompt_cache=cache)
    change(model)
    prompts = next_turn([FIRST], first)
    plain = model.generate(prompts, **ASKED, temperature=0, logprobs=True)
    with Forwards(model) as forwards:
        out = model.generate(prompts, **ASKED, temperature=0, logprobs=True, prompt_cache=cache)
    assert out.tokens == plain.tokens and out.logprobs == plain.logprobs  # the same operations
    assert (1, len(prompts[0])) in forwards.shapes


def test_another_model_reads_all_anew(model, tiny_model):
    """A cache that goes from model to model; a twin that shares all weights goes on."""
    cache = PromptCache()
    model.generate([FIRST], **ASKED, temperature=0, prompt_cache=cache)
    with Forwards(tiny_model) as forwards:
        tiny_model.generate([FIRST], **ASKED, temperature=0, prompt_cache=cache)
    assert forwards.shapes[0] == (1, 31)
    with Forwards(copy.copy(tiny_model)) as forwards:
        tiny_model.generate([FIRST], **ASKED, temperature=0, prompt_cache=cache)
    assert forwards.shapes[:2] == [(1, 4), (1, 1)]


def test_a_model_in_training_keeps_nothing(model):
    """Dropout would make each reading another."""
    cache = PromptCache()
    model.train().generate([FIRST], **ASKED, temperature=0, prompt_cache=cache)
    assert len(cache) == 0
    twin = copy.copy(model.eval())
    model.train()  # the twin shares the layers, and does not know
    twin.generate([FIRST], **ASKED, temperature=0, prompt_cache=cache)
    assert not twin.training and len(cache) == 0


OTHERS = {
    "GPT2LMHeadModel": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "MistralForCausalLM": WINDOWED,  # a window of 6, full after the first turn
    "Gemma2ForCausalLM": WINDOWED,
    "Lfm2ForCausalLM": {**GROUPED, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "MambaForCausalLM": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_caches_of_other_kinds_are_cut_or_left_alone(kind):
    """Full windows and recurrent states are read anew, whole; each answers as from scratch."""
    torch.manual_seed(0)
    config = getattr(transformers, kind.replace("ForCausalLM", "Config").replace("LMHeadModel", "Config"))
    model = with_llama_generation(getattr(transformers, kind)(config(**OTHERS[kind])).eval())
    cache, prompt = PromptCache(), [1, *range(20, 33)]
    asked = {"max_gen_len": 4, "temperature": 0, "eos_token_id": []}
    for _ in range(3):
        plain = model.generate([prompt], **asked, logprobs=True)
        with Forwards(model) as forwards:
            out = model.generate([prompt], **asked, logprobs=True, prompt_cache=cache)
        assert out.tokens == plain.tokens
        close(out.logprobs, plain.logprobs)
        prompt = [*prompt, *out.tokens[0], 7, 8, 9]
    assert forwards.shapes[-4] == (1, 4 if kind == "GPT2LMHeadModel" else 28)


def test_what_fails_keeps_nothing_and_the_next_turn_is_right(model):
    """An interrupt in the middle of an answer, and bad logits."""
    cache = PromptCache()

    def interrupted(ids, scores):
        raise KeyboardInterrupt

    first = model.generate([FIRST], **ASKED, temperature=0, prompt_cache=cache)
    prompts = next_turn([FIRST], first)
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompts, **ASKED, prompt_cache=cache, logits_processor=[interrupted])
    assert len(cache) == 0
    plain = model.generate(prompts, **ASKED, temperature=0)
    assert model.generate(prompts, **ASKED, temperature=0, prompt_cache=cache).tokens == plain.tokens
    with pytest.raises(ValueError, match="token ids must lie in"):
        model.generate([[5000]], **ASKED, prompt_cache=cache)
    assert len(cache) == 1  # refused before anything was read


def test_threads_share_a_cache(model):
    """Two conversations in turns of two threads: each answer is its own."""
    cache, starts = PromptCache(), [FIRST, [1, *range(300, 330)]]
    expected, found = [], [[], []]
    for start in starts:
        prompts, answers = [start], []
        for _ in range(3):
            out = model.generate(prompts, **ASKED, temperature=0)
            answers.append(out.tokens)
            prompts = next_turn(prompts, out)
        expected.append(answers)

    def talk(which):
        prompts = [starts[which]]
        for _ in range(3):
            out = model.generate(prompts, **ASKED, temperature=0, prompt_cache=cache)
            found[which].append(out.tokens)
            prompts = next_turn(prompts, out)

    threads = [threading.Thread(target=talk, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_what_is_not_needed_is_let_go(model):
    """Before a run whose prompts begin otherwise, and by `clear`; a copy is empty, and a budget of 0 keeps one text."""
    cache = PromptCache()
    model.generate([FIRST], **ASKED, prompt_cache=cache)
    keys = weakref.ref(cache._kept.texts[0].states[0][0])
    held = []
    hook = model.register_forward_pre_hook(lambda *_: held.append((gc.collect(), keys() is not None)[1]))
    model.generate([[1, *range(500, 530)]], **ASKED, prompt_cache=cache)
    hook.remove()
    assert held and not any(held)
    config = model.config
    column = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes, float32
    assert cache.nbytes == (31 + 6 - 1) * column
    assert len(copy.deepcopy(cache)) == len(pickle.loads(pickle.dumps(cache))) == 0
    cache.clear()
    assert len(cache) == cache.nbytes == 0
    small = PromptCache(0)
    model.generate([FIRST], **ASKED, prompt_cache=small)
    assert len(small) == 1
    model.generate([FIRST, FIRST[:9]], **ASKED, prompt_cache=small)
    assert len(small) == 0


def test_nothing_is_kept_where_the_call_says_what_cache_to_use(model):
    """A static cache, and none at all."""
    cache = PromptCache()
    for option in ({"cache_implementation": "static"}, {"use_cache": False}):
        out = model.generate([FIRST], **ASKED, temperature=0, prompt_cache=cache, **option)
        assert out.tokens == model.generate([FIRST], **ASKED, temperature=0).tokens
        assert len(cache) == 0


def test_echoed_logprobs_are_whole(model):
    """A prompt that is scored is read anew, and what it read serves the next turn."""
    cache = PromptCache()
    first = model.generate([FIRST], **ASKED, temperature=0, prompt_cache=cache)
    prompts = next_turn([FIRST], first)
    plain = model.generate(prompts, **ASKED, temperature=0, echo=True, logprobs=True)
    out = model.generate(prompts, **ASKED, temperature=0, echo=True, logprobs=True, prompt_cache=cache)
    assert out.tokens == plain.tokens and out.logprobs == plain.logprobs
    with Forwards(model) as forwards:
        model.generate(prompts, **ASKED, temperature=0, prompt_cache=cache)
    assert forwards.shapes[:2] == [(1, 4), (1, 1)]


def test_what_is_no_prompt_cache_is_refused(model):
    """A cache of transformers has its own keyword, and both at once contradict one another."""
    with pytest.raises(TypeError, match="prompt_cache must be a PromptCache, got DynamicCache: make one"):
        model.generate([FIRST], **ASKED, prompt_cache=transformers.DynamicCache())
    with pytest.raises(ValueError, match=f"{CACHE_NAME} and prompt_cache both say what has been read"):
        model.generate([FIRST], **ASKED, prompt_cache=PromptCache(), past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="max_bytes must be at least 0, got -1"):
        PromptCache(-1)
