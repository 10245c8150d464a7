"""`pipeline("text-generation")` of transformers around our models: its own arguments, and ours beside them."""

import copy

import pytest
import transformers

from tests.conftest import TINY

pytestmark = pytest.mark.slow

TEXTS = ["ROMEO:", "To be, or not to be: that is the", "The king is"]
ASKED = {"max_gen_len": 8, "temperature": 0.8, "seeds": 3}


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of this module's own: pipelines set its padding side, and batches need a pad token."""
    own = transformers.AutoTokenizer.from_pretrained(TINY)
    own.pad_token = own.eos_token
    own.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    return own


@pytest.fixture(scope="module")
def pipe(tiny_model, tokenizer):
    return transformers.pipeline("text-generation", model=tiny_model, tokenizer=tokenizer)


def completions(model, tokenizer, texts, **asked):
    """The texts that our own generate gives."""
    rows = model.generate(tokenizer(texts).input_ids, **{**ASKED, **asked}).tokens
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def test_a_batch_is_padded_and_each_row_is_as_alone(pipe, tiny_model, tokenizer):
    """One batch of ragged prompts: row by row the text of our generate, with per-row settings too."""
    expected = completions(tiny_model, tokenizer, TEXTS)
    answers = pipe(TEXTS, batch_size=3, return_full_text=False, **ASKED)
    assert [answer[0]["generated_text"] for answer in answers] == expected
    each = {"temperature": [0.0, 0.8, 1.2], "max_gen_len": [3, 8, 5]}
    answers = pipe(TEXTS, batch_size=3, return_full_text=False, **{**ASKED, **each})
    assert [answer[0]["generated_text"] for answer in answers] == completions(tiny_model, tokenizer, TEXTS, **each)


def test_without_a_batch_size_every_prompt_is_a_call(pipe, tiny_model, tokenizer):
    """Lists and generators run prompt by prompt, so an int seed means the same seed for each."""
    expected = [text for one in TEXTS for text in completions(tiny_model, tokenizer, [one])]
    assert [answer[0]["generated_text"] for answer in pipe(TEXTS, return_full_text=False, **ASKED)] == expected
    stream = pipe((text for text in TEXTS), return_full_text=False, **ASKED)
    assert [answer[0]["generated_text"] for answer in stream] == expected


def test_full_text_new_text_and_ids(pipe, tiny_model, tokenizer):
    """`return_full_text` and `return_tensors` cut nothing of ours."""
    (new,) = completions(tiny_model, tokenizer, TEXTS[:1])
    assert pipe(TEXTS[0], **ASKED) == [{"generated_text": TEXTS[0] + new}]
    assert pipe(TEXTS[0], return_full_text=False, **ASKED) == [{"generated_text": new}]
    ids = tokenizer(TEXTS[0]).input_ids
    rows = tiny_model.generate([ids], **ASKED).sequences.tolist()
    assert [pipe(TEXTS[0], return_tensors=True, **ASKED)[0]["generated_token_ids"]] == rows


def test_several_sequences_of_a_prompt(pipe, tiny_model, tokenizer):
    """`num_return_sequences`, alone and in a batch: each prompt's samples stand together."""
    ids = tokenizer(TEXTS).input_ids
    rows = tiny_model.generate(ids, num_return_sequences=2, **ASKED).tokens
    expected = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert expected[0] != expected[1]
    answers = pipe(TEXTS, batch_size=3, num_return_sequences=2, return_full_text=False, **ASKED)
    assert [one["generated_text"] for answer in answers for one in answer] == expected
    (first, second) = pipe(TEXTS[0], num_return_sequences=2, return_full_text=False, **ASKED)
    assert [first["generated_text"], second["generated_text"]] == expected[:2]


def test_chats(pipe, tiny_model, tokenizer):
    """A chat is laid out by the tokenizer's template; the answer is a message, and a begun message is gone on with."""
    chat = [{"role": "user", "content": "What is Paris?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    said = tokenizer.decode(tiny_model.generate([ids], **ASKED).tokens[0], skip_special_tokens=True)
    (answer,) = pipe(chat, **ASKED)
    assert answer["generated_text"] == [*chat, {"role": "assistant", "content": said}]
    both = pipe([chat, [*chat, {"role": "assistant", "content": "A city"}]], **ASKED)
    assert both[0][0]["generated_text"] == answer["generated_text"]
    assert both[1][0]["generated_text"][-1]["content"].startswith("A city")


def test_the_pipelines_own_words(pipe, tiny_model, tokenizer):
    """Its default of 256 new tokens gives way to ours, `stop_sequence` stops, and greedy is asked for as elsewhere."""
    (text,) = completions(tiny_model, tokenizer, TEXTS[:1])
    word = text.split()[0]
    (stopped,) = pipe(TEXTS[0], stop_sequence=word, return_full_text=False, **ASKED)
    assert stopped["generated_text"] == text[: text.index(word) + len(word)]
    (greedy,) = pipe(TEXTS[0], max_new_tokens=5, do_sample=False, return_full_text=False)
    expected = completions(tiny_model, tokenizer, TEXTS[:1], max_gen_len=5, temperature=0.0)
    assert [greedy["generated_text"]] == expected
    (greedy,) = pipe(TEXTS[0], max_gen_len=5, do_sample=False, return_full_text=False)
    assert [greedy["generated_text"]] == expected
    (long,) = pipe(TEXTS[0], max_length=len(tokenizer(TEXTS[0]).input_ids) + 5, do_sample=False)
    assert long["generated_text"] == TEXTS[0] + expected[0]


def test_settings_are_the_users_or_metas(tiny_model, tokenizer):
    """A pipeline's temperature of 0.7 is nobody's word; its user's counts, 0.7 and greedy too, wherever it is said."""

    def answer(*, made_with=None, **asked):
        made = transformers.pipeline("text-generation", model=tiny_model, tokenizer=tokenizer, **(made_with or {}))
        (found,) = made(TEXTS[0], return_full_text=False, seeds=3, **asked)
        return found["generated_text"]

    def expected(**asked):
        return completions(tiny_model, tokenizer, TEXTS[:1], **{"max_gen_len": 8, "seeds": 3, **asked})[0]

    metas, warm = expected(temperature=0.6), expected(temperature=0.7)
    assert len({metas, warm, expected(temperature=0.0)}) == 3
    assert answer(max_gen_len=8) == answer(max_new_tokens=8) == metas
    assert answer(max_gen_len=8, temperature=0.7) == answer(made_with={"temperature": 0.7}, max_gen_len=8) == warm
    assert answer(max_gen_len=8, temperature=0.0) == expected(temperature=0.0)
    config = transformers.GenerationConfig(max_new_tokens=8)
    assert answer(generation_config=config) == metas
    with pytest.raises(ValueError, match="max_new_tokens"):
        ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
        tiny_model.generate(input_ids=ids, max_gen_len=8, max_new_tokens=256, do_sample=True)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_more_output_is_left_out(pipe, batch_size):
    """`logprobs` and `echo` change no text: a pipeline has no place for what else they give."""
    plain = pipe(TEXTS, batch_size=batch_size, **ASKED)
    more = pipe(TEXTS, batch_size=batch_size, logprobs=True, echo=True, top_logprobs=2, **ASKED)
    assert [answer[0]["generated_text"] for answer in more] == [answer[0]["generated_text"] for answer in plain]


def test_a_wrong_value_is_refused_through_the_pipeline(pipe):
    """In the sentence of our generate."""
    with pytest.raises(ValueError, match=r"top_p must lie in \[0, 1\]"):
        pipe(TEXTS[0], max_new_tokens=4, top_p=1.5)
    with pytest.raises(ValueError, match="top_k=50 has no place in LLAMA2's sampler"):
        pipe(TEXTS[0], max_new_tokens=4, top_k=50)


def test_a_checkpoint_with_settings_of_its_own(tiny_model, tokenizer):
    """What a checkpoint's generation_config says of sampling reaches no pipeline of ours."""
    model = copy.copy(tiny_model)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.1, top_k=5, top_p=0.2, eos_token_id=2, bos_token_id=1, pad_token_id=2
    )
    own = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    expected = completions(tiny_model, tokenizer, TEXTS[:1])
    assert [own(TEXTS[0], return_full_text=False, **ASKED)[0]["generated_text"]] == expected
