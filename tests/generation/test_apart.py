"""Models in which rows would change each other run them apart: rotary factors that depend on the longest row."""

import pytest
import torch
from transformers import AutoConfig

from hf_llama_sampling import LlamaForCausalLM
from hf_llama_sampling.reference import reference_generate
from tests.conftest import TINY
from tests.generation.helpers import close

pytestmark = pytest.mark.slow

SHORT, MIDDLE, LONG = [1, 5, 6], [1, *range(400, 412)], [1, *range(300, 330)]
BATCH = [SHORT, LONG, MIDDLE, SHORT]


def scaled(parameters, **config_values):
    """The bundled weights under a rotary scaling."""
    config = AutoConfig.from_pretrained(TINY)
    half = config.head_dim // 2
    factors = {"short_factor": [1.0] * half, "long_factor": [8.0] * half} if "original" in str(parameters) else {}
    config.rope_parameters = {"rope_theta": 1e4, **parameters, **factors}
    for name, value in config_values.items():
        setattr(config, name, value)
    return LlamaForCausalLM.from_pretrained(TINY, config=config, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["longrope", "dynamic"])
def model(request):
    """Two scalings that begin at 16 tokens."""
    if request.param == "longrope":
        return scaled({"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 32.0})
    return scaled({"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=16)


@pytest.mark.parametrize("schedule", ["auto", "reference", "padded"])
@pytest.mark.parametrize("draw", [{"seeds": [3, 4, 5, 6]}, {"temperature": 0}], ids=["seeds", "greedy"])
def test_a_row_beside_longer_ones_is_what_it_is_alone(model, schedule, draw):
    """Tokens, reasons and logprobs, in rows' own order, whatever was run before."""
    asked = {
        "max_gen_len": [14, 6, 8, 3],
        "max_seq_len": 64,
        "echo": True,
        "sampling_logprobs": True,
        "top_logprobs": 2,
    }
    asked["logprobs_of"] = [[5], [6, 7], [9], [8]]
    batch = model.generate(BATCH, schedule=schedule, eos_token_id=[2, 989], **asked, **draw)
    for row, prompt in enumerate(BATCH):
        own = {"seeds": draw["seeds"][row]} if "seeds" in draw else draw
        limits = asked | {name: [asked[name][row]] for name in ("max_gen_len", "logprobs_of")}
        alone = model.generate([prompt], eos_token_id=[2, 989], **limits, **own)
        assert (alone.tokens[0], alone.finish_reason[0]) == (batch.tokens[row], batch.finish_reason[row])
        close(alone.logprobs, batch.logprobs[row : row + 1])
        close(alone.sampled_logprobs, batch.sampled_logprobs[row : row + 1])
        close(alone.temperature_logprobs, batch.temperature_logprobs[row : row + 1])
        close(alone.nucleus_mass, batch.nucleus_mass[row : row + 1])
        named = [
            [[value for _, value, _ in place] for place in out[0]]
            for out in (alone.logprobs_of, batch.logprobs_of[row:])
        ]
        close(*named)
        assert [[token for token, _, _ in place] for place in batch.logprobs_of[row]][1:] == [
            asked["logprobs_of"][row]
        ] * (len(batch.tokens[row]) - 1)
        assert torch.equal(batch.sequences[row, len(LONG) - len(prompt) :][: len(prompt)], torch.tensor(prompt))


def test_scores_do_not_depend_on_longer_texts(model):
    """In any company and any order, and after any call."""
    alone = [model.score_tokens([text], max_seq_len=64).logprobs[0] for text in BATCH]
    close(model.score_tokens(BATCH, max_seq_len=64).logprobs, alone)
    close(model.score_tokens(BATCH[::-1], max_seq_len=64).logprobs[::-1], alone)
    with pytest.raises(ValueError, match="raise chunk_bytes"):
        model.score_tokens([LONG], chunk_bytes=1, max_seq_len=64)


def test_copies_run_apart_with_their_prompts(model):
    """The first copy of each prompt is the prompt alone."""
    asked = {"max_gen_len": 8, "max_seq_len": 64, "seeds": 1}
    out = model.generate([SHORT, LONG], num_return_sequences=2, **asked)
    assert out.tokens[::2] == model.generate([SHORT, LONG], **asked).tokens
    assert out.tokens[0] != out.tokens[1]


def test_metas_stream_is_the_references_batch(model):
    """On Meta's stream the reference runs such a batch as one: the same tokens; padded would give others."""
    asked = {"max_gen_len": 6, "max_seq_len": 64, "temperature": 0.8, "top_p": 0.9}
    model.generate([SHORT], max_gen_len=1)
    torch.manual_seed(5)
    out = model.generate(BATCH, eos_token_id=[2], **asked)
    model.generate([SHORT], max_gen_len=1, seeds=1)  # forgets the longer texts, as each call of ours does
    torch.manual_seed(5)
    tokens, _ = reference_generate(model, BATCH, eos_ids=[2], **asked)
    assert out.tokens == tokens and out.settings["schedule"] == "reference"
    with pytest.raises(ValueError, match='schedule="padded" needs a model that leaves masked padding out'):
        model.generate(BATCH, schedule="padded", **asked)


def test_what_goes_with_one_run_is_refused_where_rows_run_apart(model):
    """A streamer and a time cannot be shared out; within the length where nothing scales, they can."""
    streamer = type("Streamer", (), {"put": lambda self, value: None, "end": lambda self: None})()
    asked = {"max_gen_len": 4, "max_seq_len": 64, "seeds": 1}
    for more in ({"streamer": streamer}, {"max_time": 9.0}):
        with pytest.raises(ValueError, match=f"{next(iter(more))} goes with one run"):
            model.generate([SHORT, LONG], **asked, **more)
        model.generate([SHORT, [1, 5]], **asked, **more)
