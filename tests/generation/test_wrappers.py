"""The model as its neighbours use it: pipelines, threads, modes, copies, other dtypes and classes."""

import copy
import pickle
import threading

import torch
import transformers
from transformers import TextIteratorStreamer

from hf_llama_sampling import LlamaForCausalLM
from hf_llama_sampling import with_llama_generation as with_ours
from tests.bounds import rounding_in_16_bits
from tests.generation.helpers import BOS, LONG, RAGGED, SHORT, at, close, plain_logprobs


def test_pipeline(tiny_model, tiny_tokenizer):
    """pipeline("text-generation") runs ours, and ignores what it does not know of the output."""
    pipe = transformers.pipeline("text-generation", model=tiny_model, tokenizer=tiny_tokenizer)
    text = "First Citizen:"
    ids = tiny_tokenizer(text).input_ids
    expected = tiny_model.generate([ids], max_gen_len=8, temperature=0.7, top_p=0.9, seeds=3).tokens[0]
    for more in ({}, {"logprobs": True, "top_logprobs": 2}):
        (answer,) = pipe(text, max_new_tokens=8, temperature=0.7, top_p=0.9, seeds=3, **more)
        assert answer["generated_text"].startswith(text)
        assert answer["generated_text"].removeprefix(text) == tiny_tokenizer.decode(
            ids + expected, skip_special_tokens=True
        ).removeprefix(text)
    greedy = pipe(text, max_new_tokens=8, do_sample=False, return_full_text=False)
    assert greedy == pipe(text, max_new_tokens=8, do_sample=False, return_full_text=False)


def test_threads_may_share_a_model(tiny_model, tiny_tokenizer):
    """Four generate at once, each into its own streamer: with seeds each gets what it gets alone."""
    prompts = [SHORT, LONG, [BOS, 40], [BOS, 300, 301]]
    alone = [tiny_model.generate([p], max_gen_len=25, seeds=row).tokens[0] for row, p in enumerate(prompts)]
    streamers = [TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, skip_special_tokens=True) for _ in prompts]
    answers = {}

    def work(row):
        answers[row] = tiny_model.generate([prompts[row]], max_gen_len=25, seeds=row, streamer=streamers[row]).tokens[0]

    threads = [threading.Thread(target=work, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    texts = ["".join(streamer) for streamer in streamers]
    for thread in threads:
        thread.join()
    assert [answers[row] for row in range(4)] == alone
    assert texts == [tiny_tokenizer.decode(row, skip_special_tokens=True) for row in alone]


def test_the_model_is_left_as_it_was(tiny_model):
    """Neither its attributes, its config, its generation config nor its mode changes."""
    before = dict(vars(tiny_model)), tiny_model.config.to_dict(), tiny_model.generation_config.to_dict()
    tiny_model.generate(RAGGED, max_gen_len=3, logprobs=True, echo=True, cache_implementation="static")
    tiny_model.score_tokens(RAGGED)
    assert dict(vars(tiny_model)) == before[0]
    assert tiny_model.config.to_dict() == before[1]
    assert tiny_model.generation_config.to_dict() == before[2]


def test_modes_copies_and_pickles(tiny_model):
    """inference_mode, train mode (no dropout here), deepcopy and pickle: the same tokens."""
    asked = {"max_gen_len": 5, "seeds": 1, "logprobs": True, "echo": True}
    expected = tiny_model.generate(RAGGED, **asked).tokens
    with torch.inference_mode():
        assert tiny_model.generate(RAGGED, **asked).tokens == expected
    with torch.enable_grad():
        out = tiny_model.generate(RAGGED, **asked)
        assert not out.sequences.requires_grad
    clone = copy.deepcopy(tiny_model)
    assert clone.train().generate(RAGGED, **asked).tokens == expected
    assert clone.training
    assert pickle.loads(pickle.dumps(clone)).generate(RAGGED, **asked).tokens == expected


def test_sixteen_bit_models_run(tiny_model):
    """bfloat16 and float16 logits are cast to float32 before any softmax: logprobs are the model's own."""
    for dtype in (torch.bfloat16, torch.float16):
        model = copy.deepcopy(tiny_model).to(dtype)
        out = model.generate([LONG], max_gen_len=5, seeds=1, logprobs=True, echo=True)
        assert out.logprobs[0][0] == 0.0
        within = rounding_in_16_bits(model, dtype, size=4.0)
        close(out.logprobs, [at(plain_logprobs(model, out.tokens[0]), out.tokens[0])], within)
        assert torch.tensor(out.logprobs).to(dtype).tolist() != out.logprobs  # no logprob of 16 bits is exact
        exact = model.generate([LONG], max_gen_len=0, logprobs=True, echo=True)
        close(exact.logprobs, model.score_tokens([LONG]).logprobs, within)
        close(exact.logprobs, tiny_model.score_tokens([LONG]).logprobs, within)


def test_tiny_and_large_batches(tiny_model):
    """A vocabulary of two, one token to start from, and 64 rows."""
    config = transformers.LlamaConfig(
        vocab_size=2,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    two = LlamaForCausalLM(config).eval()
    out = two.generate(
        [[0], [0, 1, 0]], max_gen_len=5, seeds=1, logprobs=True, top_logprobs=2, echo=True, temperature=1.0
    )
    assert all(set(row) <= {0, 1} for row in out.tokens)
    many = tiny_model.generate([[BOS]] * 64, max_gen_len=3, seeds=1)
    assert many.tokens[40] == tiny_model.generate([[BOS]], max_gen_len=3, seeds=41).tokens[0]


def test_our_class_saves_and_loads_as_transformers_own(tiny_model, tmp_path):
    """The checkpoint names LlamaForCausalLM, which AutoModel finds."""
    tiny_model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    ours = with_ours(loaded.eval())
    assert (
        ours.generate(RAGGED, max_gen_len=4, seeds=1).tokens
        == tiny_model.generate(RAGGED, max_gen_len=4, seeds=1).tokens
    )
