"""PEFT's adapters: ours beneath them and around them answer as a plain forward of the PEFT model does."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from packaging.version import Version

from hf_llama_sampling import Llama, with_llama_generation
from hf_llama_sampling.generation.releases import CACHE_NAME
from tests.bounds import rounding
from tests.conftest import TINY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TWO = [[1, 870, 988], [1, 300, 301, 302, 303, 304]]
GREEDY = {"max_gen_len": 4, "temperature": 0, "eos_token_id": []}
LM = {"task_type": "CAUSAL_LM"}
SOFT = {
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=6, **LM),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=6, encoder_hidden_size=32, **LM),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=6, **LM),
}
LAYERED = {
    "LoRA": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **LM),
    "LoRA without a task": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "LLaMA-Adapter": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, **LM),
}


def plain_model(tiny_model):
    """transformers' own class with weights of its own."""
    plain = transformers.LlamaForCausalLM(copy.deepcopy(tiny_model.config)).float().eval()
    plain.load_state_dict(tiny_model.state_dict())
    return plain


def adapted(model, config, size=1.5):
    """A PEFT model whose adapter says something; skips where soft prompts are refused (see `test_releases`)."""
    is_soft = isinstance(config, tuple(map(type, SOFT.values())))
    if is_soft and CACHE_NAME != "past_key_values" and Version(peft.__version__) < Version("0.22"):
        pytest.skip(f"PEFT {peft.__version__} loses soft prompts under transformers {transformers.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outer = peft.get_peft_model(model, copy.deepcopy(config)).eval()
    torch.manual_seed(0)
    for parameter in outer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0, size)
    return outer


def greedy_text(outer, prompt, steps=4):
    """A prompt and what follows by argmax of plain forwards."""
    text = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            text.append(int(outer(torch.tensor([text])).logits[0, -1].argmax()))
    return text


def plain_scores(outer, text):
    """Logprobs of a text's tokens but the first, by one plain forward; virtual tokens may stand before it."""
    with torch.no_grad():
        logits = outer(torch.tensor([text])).logits[0, -len(text) :]
    return torch.log_softmax(logits, -1)[range(len(text) - 1), text[1:]].tolist()


def assert_answers_as(outer, asked, tiny_model):
    """Everything that `asked` offers is what plain forwards of `outer` give."""
    texts = [greedy_text(outer, prompt) for prompt in TWO]
    scores = [plain_scores(outer, text) for text in texts]
    within = rounding(tiny_model)

    def close(found, expected):
        assert found == pytest.approx(expected, abs=within)

    completions = [text[len(prompt) :] for text, prompt in zip(texts, TWO, strict=True)]
    assert asked.generate(TWO, **GREEDY).tokens == completions
    assert asked.generate(TWO, schedule="reference", seeds=1, **GREEDY).tokens == completions
    out = asked.generate(TWO, echo=True, logprobs=True, top_logprobs=2, **GREEDY)
    assert out.tokens == texts
    copies = asked.generate([TWO[0]] * 2, num_return_sequences=2, share_prefix=True, logprobs=True, **GREEDY)
    assert copies.tokens == [completions[0]] * 4
    best = asked.score_tokens(texts, top_logprobs=1)
    contexts = [text[:-2] for text in texts]
    ends = asked.score_continuations([*contexts, contexts[0]], [*([text[-2:]] for text in texts), [[7], [7, 8]]])
    for row, expected in enumerate(scores):
        close(out.logprobs[row][1:], expected)
        close(copies.logprobs[0], scores[0][-4:])
        close(best.logprobs[row][1:], expected)
        close(ends.logprobs[row][0], expected[-2:])
        # A completion is greedy, so its tokens are the best ones.
        assert [top[0][0] for top in best.top_logprobs[row][-4:]] == completions[row]
    close(ends.logprobs[2][1], plain_scores(outer, [*contexts[0], 7, 8])[-2:])


def assert_scores_as(outer, asked, tiny_model):
    """Logprobs of a text, echoed and scored, are what a plain forward of `outer` gives."""
    text = [1, 870, 988, 13, 5, 6]
    expected = pytest.approx([0.0, *plain_scores(outer, text)], abs=rounding(tiny_model))
    assert asked.score_tokens([text]).logprobs[0] == expected
    assert asked.generate([text], max_gen_len=0, echo=True, logprobs=True).logprobs[0] == expected


def test_the_case_of_a_lost_soft_prompt(tiny_model, tiny_tokenizer):
    """Prompt tuning over our class: the same tokens with echo and logprobs, and other ones than the base model's."""
    ids = tiny_tokenizer("ROMEO:", return_tensors="pt").input_ids
    outer = adapted(copy.deepcopy(tiny_model), SOFT["prompt tuning"])
    asked = {"input_ids": ids, "max_gen_len": 6, "temperature": 0}
    tokens = [13, 985, 982, 292, 368, 845]
    assert outer.generate(**asked, return_dict_in_generate=True).tokens == [tokens]
    assert outer.generate(**asked, echo=True, logprobs=True).tokens == [[*ids[0].tolist(), *tokens]]
    assert tiny_model.generate(**asked, return_dict_in_generate=True).tokens == [[13, 985, 982, 275, 368, 824]]


@pytest.mark.parametrize("config", SOFT.values(), ids=SOFT)
def test_soft_prompts_act_wherever_a_peft_model_is_asked(tiny_model, config):
    """Over our class, in a twin of one over transformers' class, and in `Llama`: as the PEFT model's own forward."""
    over_ours = adapted(copy.deepcopy(tiny_model), config)
    assert_answers_as(over_ours, over_ours, tiny_model)
    assert with_llama_generation(over_ours) is over_ours
    over_plain = adapted(plain_model(tiny_model), config)
    twin = with_llama_generation(over_plain)
    assert_answers_as(over_plain, twin, tiny_model)
    assert type(over_plain.base_model) is transformers.LlamaForCausalLM and not hasattr(over_plain, "score_tokens")
    llama = Llama(over_plain, str(TINY), max_seq_len=64)
    assert_scores_as(over_plain, llama.model, tiny_model)
    text = greedy_text(over_plain, TWO[0])
    assert llama.generate(TWO[:1], 4, 0.0, echo=True)[0] == [text]
    with torch.no_grad():
        expected = over_plain(torch.tensor([text])).logits[:, -len(text) :]
    parts = [llama.model.forward(torch.tensor([text[:3]]), 0), llama.model.forward(torch.tensor([text[3:]]), 3)]
    assert torch.allclose(torch.cat(parts, 1), expected, rtol=0, atol=rounding(tiny_model))
    assert llama.model.layers is over_plain.base_model.model.layers


@pytest.mark.parametrize("config", LAYERED.values(), ids=LAYERED)
def test_adapters_in_the_layers_act_both_ways_round(tiny_model, config):
    """An adapter over our class, and our mixin over a PEFT model; in `Llama` too."""
    over_ours = adapted(copy.deepcopy(tiny_model), config, size=0.5)
    assert_answers_as(over_ours, over_ours, tiny_model)
    over_plain = adapted(plain_model(tiny_model), config, size=0.5)
    llama = Llama(over_plain, str(TINY), max_seq_len=64)
    assert_answers_as(over_plain, with_llama_generation(over_plain), tiny_model)
    assert_scores_as(over_plain, llama.model, tiny_model)
    assert len(llama.model.layers) == tiny_model.config.num_hidden_layers


def test_merged_and_disabled_adapters(tiny_model):
    """Merging changes nothing; a disabled adapter, LoRA or soft prompt, gives the base model's answers."""
    over_plain = adapted(plain_model(tiny_model), LAYERED["LoRA"], size=0.5)
    twin = with_llama_generation(over_plain)
    with over_plain.disable_adapter():
        assert_scores_as(tiny_model, twin, tiny_model)
    over_plain.merge_adapter()
    assert_scores_as(over_plain, twin, tiny_model)
    over_plain.unmerge_adapter()
    assert_scores_as(over_plain, twin, tiny_model)
    merged = with_llama_generation(over_plain.merge_and_unload())
    assert_scores_as(merged, merged, tiny_model)
    soft = adapted(copy.deepcopy(tiny_model), SOFT["prompt tuning"])
    with soft.disable_adapter():
        assert_scores_as(tiny_model, soft, tiny_model)
    assert_scores_as(soft, soft, tiny_model)


def test_the_base_model_beneath_a_soft_prompt_is_itself(tiny_model):
    """Asked by name, `peft_model.base_model` answers without the soft prompt, as PEFT has it."""
    soft = adapted(copy.deepcopy(tiny_model), SOFT["prompt tuning"])
    assert soft.base_model.score_tokens(TWO).logprobs == tiny_model.score_tokens(TWO).logprobs
    soft.generate(TWO, **GREEDY)  # leaves the base model's methods as they were
    assert soft.base_model.generate(TWO, **GREEDY).tokens == tiny_model.generate(TWO, **GREEDY).tokens
    assert with_llama_generation(soft.base_model).generate(TWO, **GREEDY).settings["schedule"] == "padded"


def test_an_adapter_for_each_row(tiny_model):
    """PEFT's `adapter_names`: each row under its own, also where rows that are equal would share a prefill."""
    outer = adapted(copy.deepcopy(tiny_model), LAYERED["LoRA"], size=0.5)
    outer.add_adapter("b", LAYERED["LoRA"])
    outer.eval()
    prompts = [[1, 870, 988] * 12] * 2
    outer.generate(prompts, share_prefix=True, **GREEDY)  # now it is known that the base model's caches can be shared
    torch.manual_seed(1)
    expected = []
    for name in ("default", "b"):
        outer.set_adapter(name)
        for parameter in outer.parameters():
            if name == "b" and parameter.requires_grad:
                torch.nn.init.normal_(parameter, 0, 0.5)
        expected.append(greedy_text(outer, prompts[0])[36:])
    assert expected[0] != expected[1]
    asked = {"adapter_names": ["default", "b"], **GREEDY}
    assert outer.generate(prompts, share_prefix=True, **asked).tokens == expected
    assert [row[36:] for row in outer.generate(prompts, echo=True, logprobs=True, **asked).tokens] == expected


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("prompt tuning", {"schedule": "padded"}, "padded"),
        ("prompt tuning", {"cache_implementation": "static"}, "cache_implementation has no place under a soft prompt"),
        ("prompt tuning", {"prefill_chunk_size": 2}, "prefill_chunk_size has no place under a soft prompt"),
        ("prefix tuning", {"use_cache": False}, "use_cache=False has no place under a soft prompt"),
        ("prompt tuning", {"past_key_values": transformers.DynamicCache()}, "past_key_values has no place under"),
        (
            "prompt tuning",
            {"echo": True, "logprobs": True, "chunk_bytes": 1},
            r"without virtual tokens.*raise chunk_bytes",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_soft_prompts_do_not_allow_is_refused_by_name(tiny_model, kind, options, says):
    """PEFT puts virtual tokens into an empty cache, before the padding: nothing else is run in silence."""
    soft = adapted(copy.deepcopy(tiny_model), SOFT[kind])
    with pytest.raises(ValueError, match=says):
        soft.generate(TWO, **GREEDY, **options)
    assert soft.generate(TWO, **GREEDY).settings["schedule"] == "reference"


def test_continuous_batching_is_refused_under_soft_prompts(tiny_model):
    """It has no place for virtual tokens, so the PEFT model is not answered by the model beneath."""
    soft = adapted(copy.deepcopy(tiny_model), SOFT["prompt tuning"])
    for start in (
        lambda: soft.generate_batch(TWO, max_gen_len=2),
        lambda: soft.init_continuous_batching(max_gen_len=2),
    ):
        with pytest.raises(ValueError, match="continuous batching has no place for soft prompts"):
            start()


def test_virtual_tokens_take_positions(tiny_model):
    """A model with a table of positions has fewer left for a text; beyond them it is refused."""
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    soft = adapted(with_llama_generation(transformers.GPT2LMHeadModel(config).eval()), SOFT["prompt tuning"])
    prompt = [[1, 5, 6, 7]]
    assert len(soft.generate(prompt, max_gen_len=6, temperature=0, eos_token_id=[]).tokens[0]) == 6
    for call in (
        lambda: soft.generate(prompt, max_gen_len=7),
        lambda: soft.score_tokens([[1] * 11]),
        lambda: soft.score_continuations([[1] * 10], [[[5, 6]]]),
    ):
        with pytest.raises(ValueError, match=r"16 positions .* got 11 beside 6 virtual tokens of a soft prompt"):
            call()


def test_an_adapter_that_begins_in_the_text_is_refused(tiny_model):
    """aLoRA is told by PEFT's own loop where it begins; without that it would say nothing."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[988], **LM)
    outer = adapted(copy.deepcopy(tiny_model), config)
    for call in (
        lambda: outer.generate(input_ids=torch.tensor(TWO[:1]), **GREEDY),
        lambda: outer.score_tokens(TWO),
        lambda: outer.score_continuations([[1]], [[[5]]]),
    ):
        with pytest.raises(ValueError, match="'default' begins at its alora_invocation_tokens: take a LoRA without"):
            call()
