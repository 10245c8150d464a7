"""What the model is given is what transformers' own loop gives it, whatever wraps the model and is asked for."""

import copy

import pytest
import torch
import transformers

from hf_llama_sampling import LlamaForCausalLM
from hf_llama_sampling import with_llama_generation as with_ours
from tests.conftest import compiles_forwards
from tests.generation.helpers import GROUPED, LONG, RAGGED, SHORT, close

MORE = [{}, {"logprobs": True}, {"echo": True, "logprobs": True}, {"echo": True, "top_logprobs": 2}]


def hidden_signature(model):
    """A forward whose signature says nothing, as wrappers have it."""
    other = copy.copy(model)
    other.forward = lambda *args, **kwargs: model.forward(*args, **kwargs)
    return other


def compiled(model):
    """`torch.compile` before ours; its eager backend traces and checks, and generates no code."""
    return with_ours(torch.compile(model, backend="eager", dynamic=True))


def dispatched(model):
    """accelerate's hooks on every module."""
    import accelerate

    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {f"model.layers.{index}": "cpu" for index in range(4)}
    return accelerate.dispatch_model(copy.deepcopy(model), device_map, force_hooks=True)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["reference", "padded"])
@pytest.mark.parametrize("wrap", [hidden_signature, pytest.param(compiled, marks=compiles_forwards), dispatched])
def test_wrappers_change_nothing(tiny_model, wrap, schedule):
    """Tokens, logprobs and scores under a wrapper are the bare model's, with every kind of output."""
    wrapped = wrap(tiny_model)
    asked = {"max_gen_len": 8, "seeds": 1, "schedule": schedule}
    for more in MORE:
        ours, plain = wrapped.generate(RAGGED, **asked, **more), tiny_model.generate(RAGGED, **asked, **more)
        assert ours.tokens == plain.tokens
        if more.get("logprobs"):
            close(ours.logprobs, plain.logprobs)
    close(wrapped.score_tokens(RAGGED).logprobs, tiny_model.score_tokens(RAGGED).logprobs)


class Recorder(LlamaForCausalLM):
    """Notes the names and the shapes of everything that its forward is given."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        self.given.append({name: None if value is None else value.tolist() for name, value in given.items()})
        self.given[-1] |= {name: None for name in kwargs}
        return super().forward(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, logits_to_keep=logits_to_keep, **kwargs
        )


@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_logprobs_and_echo_forward_what_a_plain_call_forwards(tiny_model, schedule):
    """Inputs, masks and positions of every forward: asking for more output adds none and changes none."""
    recorder = Recorder(tiny_model.config).eval()
    recorder.load_state_dict(tiny_model.state_dict())
    recorder.given, forwarded = [], []
    recorder.generate(RAGGED, max_gen_len=1, schedule=schedule, echo=True, logprobs=True)  # its class is tried out once
    for more in MORE:
        recorder.given = []
        recorder.generate(RAGGED, max_gen_len=5, seeds=1, eos_token_id=[], schedule=schedule, **more)
        forwarded.append(recorder.given)
    del forwarded[0]
    assert all(given == forwarded[0] for given in forwarded)
    # One forward for all prefilled columns, and one for each further column but the last.
    columns = 5 if schedule == "padded" else max(map(len, RAGGED)) - min(map(len, RAGGED)) + 5
    assert len(forwarded[0]) == columns


class NoCache(LlamaForCausalLM):
    """A forward that reads no cache and gives none."""

    def forward(self, input_ids=None, past_key_values=None, use_cache=None, attention_mask=None, **kwargs):
        return super().forward(input_ids, use_cache=False, **{name: kwargs[name] for name in kwargs if name in KNOWN})


class NeedsMore(LlamaForCausalLM):
    """A forward that needs an argument which its own `prepare_inputs_for_generation` gives."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return super().prepare_inputs_for_generation(*args, **kwargs) | {"scale": 2.0}

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, *, scale, **kwargs):
        output = super().forward(input_ids, attention_mask, position_ids, **kwargs)
        output.logits = output.logits * scale
        return output


class AllLogits(LlamaForCausalLM):
    """A forward that knows no `logits_to_keep`."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        kwargs.pop("logits_to_keep", None)
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


KNOWN = {"position_ids", "output_attentions", "output_hidden_states", "return_dict", "logits_to_keep"}


@pytest.mark.parametrize("kind", [NoCache, NeedsMore, AllLogits])
def test_forwards_of_other_kinds_give_the_same_tokens_and_outputs(tiny_model, kind):
    """Tokens and extra outputs with echo and logprobs are those without, for one length and for many."""
    model = kind(copy.deepcopy(tiny_model.config)).eval()
    model.load_state_dict(tiny_model.state_dict())
    model.set_attn_implementation("eager")
    extra = {"output_attentions": True, "output_hidden_states": True, "output_logits": True}
    for prompts in ([LONG], [SHORT, SHORT[::-1]], RAGGED):
        asked = {"max_gen_len": 5, "seeds": 1, "eos_token_id": [], **(extra if prompts is not RAGGED else {})}
        plain, *others = (model.generate(prompts, **asked, **more) for more in MORE)
        for out in others:
            assert [row[-5:] for row in out.tokens] == plain.tokens
            for name in ("logits", "attentions", "hidden_states"):
                same(getattr(out, name), getattr(plain, name))
            assert (out.past_key_values is None) == (plain.past_key_values is None)
            if plain.past_key_values is not None:
                assert out.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()


def same(ours, theirs):
    """Nested tuples of tensors that are equal up to rounding: a last column alone is multiplied otherwise."""
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    else:
        assert (ours is None) == (theirs is None)
        assert theirs is None or len(ours) == len(theirs)
        for one, other in zip(ours or (), theirs or (), strict=True):
            same(one, other)


def test_a_model_without_the_logits_of_a_prompt_is_refused_by_name(tiny_model):
    """Where the forward gives the last position's logits alone, prompts cannot be scored; all else works."""

    class LastOnly(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **{**kwargs, "logits_to_keep": 1})

    model = LastOnly(tiny_model.config).eval()
    model.load_state_dict(tiny_model.state_dict())
    expected = tiny_model.generate([LONG], max_gen_len=4, seeds=1).tokens
    assert model.generate([LONG], max_gen_len=4, seeds=1, logprobs=True).tokens == expected
    with pytest.raises(ValueError, match="the logits of all its positions, and LastOnly does not: leave out echo"):
        model.generate([LONG], max_gen_len=4, seeds=1, logprobs=True, echo=True)


def test_attentions_of_chunked_prompts_are_whole(tiny_model):
    """A caller who keeps all attentions gets them of one forward, whatever the budget for logits."""
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation("eager")
    asked = {"max_gen_len": 3, "seeds": 1, "output_attentions": True, "echo": True, "logprobs": True}
    whole = model.generate([LONG], **asked)
    same(model.generate([LONG], chunk_bytes=1, **asked).attentions, whole.attentions)
    assert whole.attentions[0][0].shape[-2:] == (7, 7)


def test_a_state_outside_the_caches_layers_is_not_cut_into_chunks():
    """A model whose cache holds more than keys and values is refused for several chunks, and right in one."""
    config = transformers.Lfm2Config(
        **GROUPED, layer_types=["conv", "full_attention"], conv_L_cache=3, block_auto_adjust_ff_dim=False
    )
    torch.manual_seed(0)
    model = with_ours(transformers.Lfm2ForCausalLM(config).eval())
    asked = {"max_gen_len": 3, "seeds": 1, "echo": True, "logprobs": True}
    whole = model.generate([LONG], **asked)
    close(model.score_tokens(whole.tokens).logprobs, whole.logprobs)
    with pytest.raises(ValueError, match="Lfm2ForCausalLM has none: raise chunk_bytes"):
        model.generate([LONG], chunk_bytes=1, **asked)
