"""Tokenizers of other families behind `Llama`: BOS that is EOS, no BOS, more tokens than the model embeds."""

import pytest
import torch
import transformers

from hf_llama_sampling import Llama, LlamaForCausalLM, Tokenizer
from tests.conftest import TINY
from tests.llama.test_checkpoint import llama as random_llama
from tests.llama.test_checkpoint import write
from tests.llama.test_tokenizer import byte_level


def model_for(tokenizer, **eos):
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **eos,
    )
    return LlamaForCausalLM(config).eval()


# BOS that is EOS (GPT-2, Pythia, OPT)


@pytest.fixture
def gpt2_like():
    tokenizer = byte_level(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    token = tokenizer.bos_token_id
    return Llama(model_for(tokenizer, bos_token_id=token, eos_token_id=token), tokenizer, max_seq_len=64)


@pytest.mark.parametrize("compat", ["meta", "fixed"])
@pytest.mark.parametrize("max_gen_len", [0, 6])
def test_a_bos_that_is_the_eos_does_not_end_the_prompt(gpt2_like, compat, max_gen_len):
    """Echo returns prompt and completion, with their logprobs, although the prompt begins with the EOS."""
    gpt2_like.compat = compat
    (plain,) = gpt2_like.text_completion(["Hello"], temperature=0.0, max_gen_len=max_gen_len)
    (echoed,) = gpt2_like.text_completion(["Hello"], 0.0, max_gen_len=max_gen_len, logprobs=True, echo=True)
    assert echoed["generation"] == "Hello" + plain["generation"]
    assert len(echoed["tokens"]) == len(echoed["logprobs"]) >= 6 and echoed["logprobs"][0] == 0.0
    ids = gpt2_like.tokenizer.encode("Hello", bos=True, eos=False)
    (scored,) = gpt2_like.model.score_tokens([ids]).logprobs
    # 64 float32 steps at the size of a logprob of 257 tokens, which is below 8
    assert echoed["logprobs"][:6] == pytest.approx(scored, abs=64 * 2.0**-20)


def test_a_generated_eos_still_ends_the_text(gpt2_like):
    """Only the prompt's own BOS is spared."""
    token = gpt2_like.tokenizer.bos_id
    bias = torch.zeros(gpt2_like.model.config.vocab_size)
    bias[token] = 100.0
    gpt2_like.model.lm_head.bias = torch.nn.Parameter(bias)
    assert gpt2_like.text_completion(["Hi"], 0.0, max_gen_len=8) == [{"generation": ""}]
    assert gpt2_like.text_completion(["Hi"], 0.0, max_gen_len=8, echo=True) == [{"generation": "Hi"}]


def test_metas_quirk_stays_where_bos_and_eos_differ(tiny_model):
    """With LLAMA2's tokenizer an EOS inside an echoed prompt cuts it, as in the reference."""
    llama = Llama(tiny_model, str(TINY), max_seq_len=64)
    assert llama.generate([[1, 870, 2, 988]], 2, 0.0, echo=True)[0] == [[1, 870]]


# No BOS (Qwen)


@pytest.fixture
def qwen_like():
    tokenizer = byte_level(eos_token="<|endoftext|>")
    return Llama(model_for(tokenizer, eos_token_id=tokenizer.eos_token_id), tokenizer, max_seq_len=64)


def test_without_a_bos_the_prompt_is_the_text_alone(qwen_like):
    """`text_completion` answers, as `generate` does for the bare ids."""
    ids = qwen_like.tokenizer.encode("Hello", bos=False, eos=False)
    (tokens,), _ = qwen_like.generate([ids], 6, 0.0)
    assert qwen_like.text_completion(["Hello"], 0.0, max_gen_len=6) == [{"generation": qwen_like.text_of(tokens)}]


def test_without_a_bos_an_empty_prompt_is_refused(qwen_like):
    """There is nothing to start from; the sentence names the prompt and the rule."""
    with pytest.raises(ValueError, match="prompt 1 is empty and this tokenizer has no BOS"):
        qwen_like.text_completion(["Hello", ""], 0.0, max_gen_len=2)


def test_without_a_bos_a_dialog_is_encoded_all_the_same(qwen_like):
    """LLAMA2's format leaves the BOS out where there is none."""
    dialog = [{"role": "user", "content": "Hi"}]
    assert qwen_like.encode_dialog(dialog) == qwen_like.tokenizer.encode("[INST] Hi [/INST]", False, False)
    assert qwen_like.chat_completion([dialog], 0.0, max_gen_len=2)[0]["generation"]["role"] == "assistant"


# One token more than the model embeds (Llama-2 with a pad token added)


def padded_tokenizer():
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def test_a_token_that_was_added_may_be_missing_in_the_model(tiny_model):
    """The answers are those of the tokenizer without it; the id itself is refused where it occurs."""
    tokenizer = padded_tokenizer()
    llama, bare = Llama(tiny_model, tokenizer, max_seq_len=64), Llama(tiny_model, str(TINY), max_seq_len=64)
    assert llama.tokenizer.n_words == 1025
    arguments = {"temperature": 0.0, "max_gen_len": 6, "echo": True, "logprobs": True}
    assert llama.text_completion(["ROMEO:"], **arguments) == bare.text_completion(["ROMEO:"], **arguments)
    dialogs = [[{"role": "user", "content": "Who?"}]]
    assert llama.chat_completion(dialogs, 0.0, max_gen_len=4) == bare.chat_completion(dialogs, 0.0, max_gen_len=4)
    with pytest.raises(ValueError, match=r"1024.* row 0"):
        llama.generate([[1, tokenizer.pad_token_id]], 2)


def test_added_words_that_the_model_lacks_are_refused_where_they_occur(tiny_model):
    """A word that was added, and is no control token, is one id: the sentence names it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["Verona"])
    llama = Llama(tiny_model, tokenizer, max_seq_len=64)
    assert llama.text_completion(["ROMEO:"], 0.0, max_gen_len=2)
    with pytest.raises(ValueError, match="1024"):
        llama.text_completion(["in Verona"], 0.0, max_gen_len=2)


def test_metas_folder_takes_a_tokenizer_with_an_added_token(tmp_path):
    """The embedding has one row per token of the tokenizer, those that were added apart."""
    write(tmp_path, random_llama(vocab=1024))
    assert Llama.build(tmp_path, padded_tokenizer(), 64, 1).generate([[1, 5]], 2)[0]
    write(tmp_path, random_llama(vocab=1023))
    with pytest.raises(ValueError, match="has 1023 where the tokenizer says 1025"):
        Llama.build(tmp_path, padded_tokenizer(), 64, 1)


def test_a_tokenizer_of_another_model_is_refused(llama_tokenizer_path, tiny_model):
    """32,000 pieces that were not added do not fit 1,024 embeddings."""
    with pytest.raises(ValueError, match=r"32000.*1024.*that came with the model"):
        Llama(tiny_model, Tokenizer(llama_tokenizer_path))
