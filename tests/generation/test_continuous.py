"""Continuous batching: a request's tokens are those of `generate(seeds=)`, whatever else is in flight."""

import collections
import concurrent.futures
import copy
import pickle
import random
import sys

import pytest
import torch
import transformers
from packaging.version import Version

from hf_llama_sampling import LlamaForCausalLM, with_llama_generation
from tests.conftest import TINY
from tests.families.zoo import CONTEXT, build_ours
from tests.families.zoo import EOS as FAMILY_EOS
from tests.generation.batching import FEW, answer, answers, config, cpu_as_a_device, without_collections
from tests.generation.helpers import BOS, EOS, RAGGED, SHORT, close

pytestmark = pytest.mark.slow

batching = pytest.importorskip("transformers.generation.continuous_batching.cb_logits_processors")

ROWS = 64
PROMPTS = [[1, 5, 6], [1, *range(60, 72)], [1, *range(7, 25)]]  # of other families
LOOPS = {
    "few blocks": {},
    "no sharing": {"allow_block_sharing": False, "scheduler_type": "prefill_first"},
    "offload": {"cpu_offload_space": 0.001},
    "asynchronous": {"use_async_batching": True},
    "asynchronous, offload": {"use_async_batching": True, "cpu_offload_space": 0.001},
    "room for all": {"num_blocks": 200, "max_batch_tokens": 256},
}


def random_rows(seed, rows=ROWS):
    """Prompts, some with a common beginning, and settings of each."""
    draw = random.Random(seed)
    header = [BOS, *(draw.randrange(3, 1000) for _ in range(20))]
    prompts = [
        (header if draw.random() < 0.4 else [BOS]) + [draw.randrange(3, 1000) for _ in range(draw.randint(0, 24))]
        for _ in range(rows)
    ]
    return prompts, {
        "temperature": [draw.choice([0, 0.6, 1.0, 1.7, 1e-40]) for _ in prompts],
        "top_p": [draw.choice([0.0, 0.5, 0.9, 1.0]) for _ in prompts],
        "max_gen_len": [draw.randint(0, 26) for _ in prompts],
        "seeds": [draw.randrange(2**64) for _ in prompts],
    }


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_collections(monkeypatch)


@pytest.fixture(scope="module")
def expected(tiny_model):
    """The answers of `generate` to some random rows."""
    prompts, settings = random_rows(1)
    return tiny_model.generate(prompts, logprobs=True, **settings)


@pytest.fixture
def made_room(monkeypatch):
    """How many requests lost their cache, and how many had it kept beside the device."""
    from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
    from transformers.generation.continuous_batching.requests import RequestState

    counts = collections.Counter()
    again, offload = RequestState.create_equivalent_initial_request, OffloadingManager._offload_to_cpu

    def read_again(state):
        counts["read again"] += 1
        return again(state)

    def kept(manager, *args):
        offloaded = offload(manager, *args)
        counts["kept"] += len(offloaded)
        return offloaded

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", read_again)
    monkeypatch.setattr(OffloadingManager, "_offload_to_cpu", kept)
    return counts


@pytest.mark.parametrize("loop", LOOPS)
def test_random_requests_equal_generate(tiny_model, expected, made_room, loop):
    """Tokens and raw logprobs, with requests that make room for each other, in both loops."""
    prompts, settings = random_rows(1)
    with cpu_as_a_device():
        out = tiny_model.generate_batch(
            prompts, logprobs=True, continuous_batching_config=config(**LOOPS[loop]), **settings
        )
    assert answers(out) == expected.tokens
    close([result.logprobs[: len(answer(result))] for result in out.values()], expected.logprobs)
    assert made_room["kept" if "offload" in loop else "read again"] > 5 or loop == "room for all"


def test_requests_that_come_over_time_equal_generate(tiny_model):
    """In another order, each while others are in flight, streamed ones and cancelled ones among them."""
    prompts, settings = random_rows(2)
    expected = tiny_model.generate(prompts, **settings).tokens
    names = {"temperature": "temperature", "top_p": "top_p", "max_gen_len": "max_gen_len", "seeds": "seed"}
    order = random.Random(3).sample(range(ROWS), ROWS)
    streamed, cancelled = set(order[::5]), set()
    results, parts = {}, collections.defaultdict(list)
    with tiny_model.continuous_batching_context_manager(continuous_batching_config=config()) as manager:
        for place, row in enumerate(order):
            asked = {names[name]: values[row] for name, values in settings.items()}
            manager.add_request(prompts[row], f"row {row}", streaming=row in streamed, **asked)
            if place % 7 == 3:
                with manager.pause():
                    cancelled.add(manager.add_request(SHORT, f"cancelled {row}", 40, temperature=1.7, streaming=True))
                    manager.cancel_request(f"cancelled {row}")
            while place >= 10 and place - len(results) > 10:  # wait until some are done
                take(manager, results, parts)
        while len(results) < ROWS:
            take(manager, results, parts)
    assert [answer(results[f"row {row}"]) for row in range(ROWS)] == expected
    for row in streamed - {row for row in streamed if not expected[row]}:
        tokens = results[f"row {row}"].generated_tokens
        assert parts[f"row {row}"] == [tokens[:length] for length in range(1, len(tokens))]
    assert len(cancelled) > 5 and not cancelled & set(results)


def take(manager, results, parts):
    """Wait for one result: a finished one, or a part of a streamed one."""
    result = manager.get_result()
    if result.is_finished():
        results[result.request_id] = result
    else:
        parts[result.request_id].append(result.generated_tokens)


@pytest.mark.parametrize("options", [{}, {"use_async_batching": True}, {"num_blocks": 60}])
def test_children_equal_copies(tiny_model, options):
    """A request is followed by its children, and together they are the copies of `num_return_sequences`."""
    prompts, asked = [[BOS], SHORT, [BOS] * 20], {"seeds": [5, 6, 6], "max_gen_len": 12, "num_return_sequences": 3}
    expected = tiny_model.generate(prompts, temperature=1.0, **asked).tokens
    with cpu_as_a_device():
        out = tiny_model.generate_batch(prompts, temperature=1.0, continuous_batching_config=config(**options), **asked)
    assert answers(out) == expected
    assert list(out)[:4] == ["req_0", "req_0__child#0", "req_0__child#1", "req_1"]


def test_an_answer_depends_on_its_seed_and_prompt_alone(tiny_model):
    """Not on its name, on the order, or on what else was asked for."""
    alone = answers(tiny_model.generate_batch([SHORT], max_gen_len=9, seeds=[4], temperature=1.0))
    with tiny_model.continuous_batching_context_manager(temperature=1.0, max_gen_len=9, logprobs=True) as manager:
        manager.add_requests([[BOS, 9]] * 3, seeds=100)
        manager.add_request(torch.tensor(SHORT), "req of mine", seed=4, streaming=True)
        results = {result.request_id: result for result in iter_finished(manager, 4)}
    assert answer(results["req of mine"]) == alone[0]


def iter_finished(manager, count):
    """The finished ones among the results, so many."""
    while count:
        result = manager.get_result()
        if result.is_finished():
            count -= 1
            yield result


def test_settings_come_from_request_then_manager_then_metas_defaults(tiny_model):
    """A checkpoint contributes none; a config in the call does."""
    model = copy.copy(tiny_model)
    model.generation_config = transformers.GenerationConfig(eos_token_id=EOS, temperature=1.7, top_k=3, do_sample=True)
    expected = tiny_model.generate(RAGGED, max_gen_len=9, seeds=3).tokens
    assert answers(model.generate_batch(RAGGED, max_new_tokens=9, seeds=3)) == expected
    greedy = tiny_model.generate([SHORT], max_gen_len=7, temperature=0).tokens
    idle = {"top_k": 0, "typical_p": 1.0, "repetition_penalty": 1.0, "disable_compile": True}  # as trainers say
    given = transformers.GenerationConfig(do_sample=False, max_new_tokens=7, **idle)
    assert answers(model.generate_batch([SHORT], given)) == greedy
    warm = tiny_model.generate([SHORT], max_gen_len=5, temperature=1.5, top_p=1.0, seeds=8).tokens
    with model.continuous_batching_context_manager(given) as manager:
        manager.add_request(SHORT)
        assert answer(next(iter_finished(manager, 1))) == greedy[0]
        manager.add_request(SHORT, max_gen_len=5, temperature=1.5, top_p=1.0, seed=8)
        assert answer(next(iter_finished(manager, 1))) == warm[0]


def test_global_generators(tiny_model):
    """Requests without a seed draw one from torch's generator; with seeds it is left alone."""
    before = torch.get_rng_state()
    tiny_model.generate_batch(RAGGED, max_gen_len=4, seeds=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    first = answers(tiny_model.generate_batch(RAGGED, max_gen_len=9, temperature=1.7))
    assert answers(tiny_model.generate_batch(RAGGED, max_gen_len=9, temperature=1.7)) != first
    torch.manual_seed(5)
    assert answers(tiny_model.generate_batch(RAGGED, max_gen_len=9, temperature=1.7)) == first


def test_limits_and_endings(tiny_model):
    """`max_seq_len` counts the prompt, an EOS of the call ends a request and stays in its tokens, 0 gives none."""
    asked = {"seeds": 3, "max_gen_len": [0, 9, 9]}
    expected = tiny_model.generate(RAGGED, max_seq_len=8, **asked)
    out = tiny_model.generate_batch(RAGGED, max_seq_len=8, **asked)
    assert answers(out) == expected.tokens and list(map(len, expected.tokens)) == [0, 1, 6]
    with tiny_model.continuous_batching_context_manager(max_gen_len=0) as manager:
        assert manager.get_result(manager.add_request(SHORT)).generated_tokens == []
    stop = expected.tokens[2][3]
    (result,) = tiny_model.generate_batch(RAGGED[2:], max_gen_len=9, seeds=5, eos_token_id=[stop, 3]).values()
    assert result.generated_tokens == expected.tokens[2][: expected.tokens[2].index(stop) + 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_bad_logits_fail_their_request_alone(tiny_model, bad, temperature):
    """Named by position; others go on. A streamed one ends at once."""
    plain = tiny_model.generate([SHORT, SHORT], max_gen_len=6, seeds=[1, 2], temperature=temperature).tokens

    def plant(module, args, kwargs, output):
        rows = kwargs["position_ids"][0, kwargs["logits_to_keep"]] == len(SHORT) + 2
        rows &= kwargs["input_ids"][0, kwargs["logits_to_keep"]] >= 0
        output.logits[0, rows.nonzero()[:1, 0], 17] = bad

    handle = tiny_model.register_forward_hook(plant, with_kwargs=True)
    try:
        with tiny_model.continuous_batching_context_manager(temperature=temperature, max_gen_len=6) as manager:
            manager.add_request(SHORT, seed=1, streaming=True)
            first = next(iter_finished(manager, 1))
            assert "position 6 of request 'req_0' hold nan or inf" in first.error
        with pytest.raises(ValueError, match=r"row 1: the model's logits must be finite.*position 6 of request"):
            tiny_model.generate_batch([[BOS], SHORT], max_gen_len=5, seeds=1, temperature=temperature)
    finally:
        handle.remove()
    assert (
        answers(tiny_model.generate_batch([SHORT] * 2, max_gen_len=6, seeds=[1, 2], temperature=temperature)) == plain
    )


def test_a_fault_of_the_model_comes_through(tiny_model):
    """As the cause of an error, with the manager stopped."""
    handle = tiny_model.register_forward_pre_hook(lambda module, args: 1 / 0)
    try:
        with pytest.raises(RuntimeError, match="continuous batching failed: division by zero"):
            tiny_model.generate_batch(RAGGED, max_gen_len=4)
    finally:
        handle.remove()
    with tiny_model.continuous_batching_context_manager(max_gen_len=2) as manager:
        pass
    with pytest.raises(RuntimeError, match="takes no requests any more"):
        manager.add_request(SHORT)


def test_the_model_is_left_as_it_was():
    """Attention, mode, config; eager attention and a training model give the same answers."""
    model = with_llama_generation(
        transformers.LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    )
    expected = model.eval().generate(RAGGED, max_gen_len=5, seeds=1).tokens
    model.train()
    assert answers(model.generate_batch(RAGGED, max_gen_len=5, seeds=1)) == expected
    assert model.training and model.config._attn_implementation == "eager"
    assert "_cached_continuous_batching_manager" not in vars(model)


def test_a_manager_that_does_not_run_leaves_the_model_as_it_is():
    """Made, asked, or failed to start: `generate` works beside it. Pages are read only within a step."""
    model = with_llama_generation(
        transformers.LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    )
    expected = model.eval().generate([SHORT], max_gen_len=3, seeds=1).tokens
    model.train()
    manager = model.init_continuous_batching(max_gen_len=3)
    manager.add_request(SHORT, "first", seed=1)
    assert model.training and model.generate([SHORT], max_gen_len=3, seeds=1).tokens == expected
    manager.stop()
    assert model.training and model.config._attn_implementation == "eager"
    for _ in range(2):
        manager.start()
        assert not model.training and model.generate([SHORT], max_gen_len=3, seeds=1).tokens == expected
        manager.stop()
        assert model.training and model.config._attn_implementation == "eager"
    assert manager.get_result("first").generated_tokens == expected[0]
    failing = model.init_continuous_batching(max_gen_len=3)
    failing._create_batch_processor = lambda: [][0]
    with pytest.raises(IndexError):
        failing.start()
    assert model.training and model.config._attn_implementation == "eager"


def test_a_manager_can_be_kept(tiny_model):
    """With other settings in each call; what it was made for cannot change."""
    asked = {"max_gen_len": 5, "persistent_manager": True}
    first = tiny_model.generate_batch(RAGGED, seeds=1, **asked)
    kept = tiny_model._cached_continuous_batching_manager
    again = tiny_model.generate_batch(RAGGED, seeds=2, temperature=0, **asked)
    assert tiny_model._cached_continuous_batching_manager is kept
    assert answers(first) == tiny_model.generate(RAGGED, seeds=1, max_gen_len=5).tokens
    assert answers(again) == tiny_model.generate(RAGGED, temperature=0, max_gen_len=5).tokens
    with pytest.raises(ValueError, match="keeps a manager of an earlier call"):
        tiny_model.generate_batch(RAGGED, logprobs=True, **asked)
    tiny_model.destroy_cached_continuous_batching_manager()
    assert tiny_model.generate_batch(RAGGED, logprobs=True, max_gen_len=5)["req_0"].logprobs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_forwards_beside_steps_see_nothing_of_them(attention):
    """A step makes the config not causal, and its attention paged; calls of other threads on the model wait for it.

    Two managers, generate and score at once answer as alone, and leave the config and each layer's mode as they were.
    """
    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation=attention).eval()
    asked = {"max_gen_len": 12, "seeds": 1, "eos_token_id": []}
    tokens, totals = model.generate(RAGGED, **asked).tokens, model.score_tokens(RAGGED).totals
    model.train().model.layers[0].eval()
    config, modes = model.config.to_dict(), [module.training for module in model.modules()]
    calls = [
        lambda: answers(model.generate_batch(RAGGED, **asked)) == tokens,
        lambda: answers(model.generate_batch(RAGGED, **asked)) == tokens,
        lambda: model.generate(RAGGED, **asked).tokens == tokens,
        lambda: model.score_tokens(RAGGED).totals == pytest.approx(totals, abs=1e-3),
    ]
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        assert all(pool.map(lambda call: all(call() for _ in range(3)), calls))
    assert (model.config.to_dict(), [module.training for module in model.modules()]) == (config, modes)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_callers_own_forwards_beside_a_manager(attention):
    """Of the model, of its body, of a copy, and ones that fail: they wait for its steps, and leave nothing behind."""
    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation=attention).eval()
    text = torch.tensor([[BOS, *range(40, 60)]])
    logits, states = model(text).logits, model.model(text)[0]
    asked = {"max_gen_len": 40, "temperature": 0, "eos_token_id": []}
    tokens = model.generate([SHORT], **asked).tokens[0]

    def forwards(tried):
        with pytest.raises(IndexError):
            tried(text + 1024)
        found = tried(text).logits, tried.model(text)[0]
        return all(torch.allclose(*pair, atol=1e-3) for pair in zip(found, (logits, states), strict=True))

    with model.continuous_batching_context_manager(**asked) as manager:
        names = [manager.add_request(SHORT, streaming=name == 0) for name in range(4)]
        manager.get_result()  # the first token: it is in flight
        while manager.batch_processor.has_pending_requests():
            assert forwards(model)
        twin = pickle.loads(pickle.dumps(model))
    results = {result.request_id: result for result in manager if result.is_finished()}
    assert [results[name].generated_tokens for name in names] == [tokens] * 4
    assert forwards(model) and forwards(twin) and not model._forward_pre_hooks and not model.model._forward_hooks


@torch.no_grad()
def test_a_model_that_changed_answers_as_it_now_is(tiny_model):
    """Prompts that share pages with earlier ones, in a manager that was kept, that runs, and that was stopped."""
    model, prompt = copy.deepcopy(tiny_model), [BOS, *range(40, 110)]
    asked = {"max_gen_len": 4, "temperature": 0, "eos_token_id": []}

    def change():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-1.5)

    def changed():
        change()
        return model.generate([prompt], **asked).tokens[0]

    model.generate_batch([prompt], persistent_manager=True, **asked)
    expected = changed()
    kept = model.generate_batch([prompt], persistent_manager=True, **asked)
    assert answers(kept) == [expected]
    model.destroy_cached_continuous_batching_manager()
    manager = model.init_continuous_batching(**asked)
    for _ in range(2):
        manager.start()
        for _ in range(2):
            manager.add_request(prompt)
            assert answer(manager.get_result()) == expected
            expected = changed()
        manager.add_request(prompt, max_gen_len=400, eos_token_id=1023, streaming=True)
        manager.get_result()  # its first token: it is in flight, with hundreds to come
        change()
        try:
            with pytest.raises(RuntimeError, match="the model has changed while requests are in flight"):
                manager.add_request(prompt)
        finally:
            manager.stop(hard_stop=True)
        expected = model.generate([prompt], **asked).tokens[0]
        while manager.get_result(timeout=0.01) is not None:
            pass


def test_a_batch_within_inference_mode(tiny_model):
    """The manager's thread is in none, and writes to what was made before it."""
    with torch.inference_mode():
        found = tiny_model.generate_batch(RAGGED, seeds=1, max_gen_len=3)
    assert answers(found) == tiny_model.generate(RAGGED, seeds=1, max_gen_len=3).tokens


def test_a_release_without_the_api_is_refused_by_name(tiny_model, monkeypatch):
    """Where one of transformers' modules is missing, all three ways in say which release has it."""
    monkeypatch.delitem(sys.modules, "hf_llama_sampling.generation.request_manager", raising=False)
    monkeypatch.setitem(sys.modules, "transformers.generation.continuous_batching.model_runner", None)
    sentence = r"needs the classes of transformers 5.23, and transformers .* has not all of them"
    with pytest.raises(ValueError, match=sentence):
        tiny_model.generate_batch(RAGGED, max_gen_len=2)
    with pytest.raises(ValueError, match=sentence):
        tiny_model.init_continuous_batching()
    with pytest.raises(ValueError, match=sentence), tiny_model.continuous_batching_context_manager():
        pass


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cpu_offload_space": 0.001}, "cpu_offload_space=0.001 keeps caches in pinned memory"),
        ({"use_async_batching": True}, "use_async_batching=True needs a model on a GPU, and this one is on cpu"),
    ],
)
def test_what_needs_a_device_is_refused_without_one(tiny_model, options, sentence):
    """transformers' pinned memory and its asynchronous loop: a sentence says so."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a device")
    with pytest.raises(ValueError, match=sentence):
        tiny_model.generate_batch(RAGGED, max_gen_len=2, continuous_batching_config=config(**options))


def test_the_cache_is_sized_by_the_requests(tiny_model):
    """On CPU, where transformers would take most of the memory; a request that cannot fit is refused."""
    manager = tiny_model.init_continuous_batching(max_gen_len=4)
    manager.add_request(SHORT)
    held = manager.batch_processor.cache
    assert held.num_blocks * 32 <= 16_384 + 512 and held.cache_tensor.numel() < 64 << 20
    manager.start()
    assert len(answer(manager.get_result())) == 4
    manager.stop()
    room = FEW["num_blocks"] * FEW["page_size"]
    manager = tiny_model.init_continuous_batching(continuous_batching_config=config(), eos_token_id=[])
    manager.add_request([BOS] * 40, max_gen_len=room - 39, seed=1)
    with pytest.raises(ValueError, match=f"must fit the cache of {room} tokens, but this one may reach {room + 1}"):
        manager.add_request([BOS] * 40, max_gen_len=room - 38)
    manager.start()
    assert len(answer(manager.get_result())) == room - 39
    manager.stop()


@pytest.mark.parametrize("family", ["mistral", "gpt2", "ctrl", "gpt_oss", "bert"])
def test_other_families(family):
    """Windows, learned and computed positions, sinks; tried out where the family is not known."""
    model = build_ours(family)
    asked = {"max_gen_len": 6, "max_seq_len": CONTEXT, "seeds": 7, "temperature": 0.9}
    expected = model.generate(PROMPTS, **asked).tokens
    try:
        found = model.generate_batch(
            PROMPTS, continuous_batching_config=config(num_blocks=16, max_batch_tokens=16), **asked
        )
    except ValueError as error:
        # From 5.24 on both ask pages for a length, and BERT's forward needs int64 positions under an older torch.
        newer, older = (
            Version(transformers.__version__) >= Version("5.24"),
            Version(torch.__version__) < Version("2.13"),
        )
        if (newer and family in ("bert", "ctrl")) or (older and family == "bert"):
            pytest.skip(f"transformers' own forward fails on pages here: {error}")
        raise
    cut = [
        tokens[:-1] if tokens[-1:] == [FAMILY_EOS] else tokens
        for tokens in (r.generated_tokens for r in found.values())
    ]
    assert cut == expected


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        *((name, "does not keep requests apart") for name in ("bart", "bert_not_causal", "bloom", "stablelm", "mamba")),
        ("moshi", "does not keep requests apart"),  # its pages are read without its window
        *((name, "rotary factors depend on the longest text") for name in ("llama_dynamic", "llama_longrope")),
    ],
)
def test_models_whose_requests_would_not_stay_apart_are_refused_by_name(family, sentence):
    """Some would give other answers in silence (bart, bert), some would end in a traceback of attention."""
    model = build_ours(family)
    implementation = model.config._attn_implementation
    with pytest.raises(ValueError, match=sentence):
        model.generate_batch(PROMPTS, max_gen_len=6, max_seq_len=CONTEXT, seeds=7)
    assert model.config._attn_implementation == implementation
