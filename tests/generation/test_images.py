"""Images and token types beside the prompts: as the model's own forward reads them, or refused by name."""

import pytest
import torch
import transformers

from hf_llama_sampling import with_llama_generation
from tests.bounds import rounding

IMAGE = 60
LONG, SHORT = [1, 5, 6, *[IMAGE] * 4, 7, 8], [1, 5, *[IMAGE] * 4, 3]
GREEDY = {"max_gen_len": 4, "temperature": 0, "eos_token_id": []}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 16}


def gemma3():
    """Its tokens of an image see each other, which its `token_type_ids` say."""
    text = {**TEXT, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
    config = transformers.Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={**VISION, "num_hidden_layers": 1, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=61,
        eoi_token_index=62,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llava():
    """Its tokens of an image are read as text is."""
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION, num_hidden_layers=2, patch_size=8, projection_dim=16),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


@pytest.fixture(scope="module", params=[gemma3, llava])
def model(request):
    """A tiny model that reads images, with our mixin."""
    torch.manual_seed(0)
    return with_llama_generation(request.param().float().eval())


@pytest.fixture(scope="module")
def images():
    """(2, 3, 16, 16): an image for each of two prompts."""
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def types_of(model, texts):
    """The token types of texts, for models that read them."""
    takes = "Gemma3" in type(model).__name__
    return {"token_type_ids": [[int(token == IMAGE) for token in text] for text in texts]} if takes else {}


def plain_scores(model, text, image):
    """Logprobs of a text's tokens but the first, by one plain forward."""
    given = {name: torch.tensor(values) for name, values in types_of(model, [text]).items()}
    with torch.no_grad():
        logits = model(torch.tensor([text]), pixel_values=image, **given).logits[0]
    return torch.log_softmax(logits, -1)[range(len(text) - 1), text[1:]].tolist()


def test_echo_and_logprobs_are_those_of_a_plain_forward(model, images):
    """With anything to generate or nothing, in both conventions, also where an image ends the prompt."""
    asked = {"pixel_values": images[:1], "echo": True, "logprobs": True}
    out = model.generate([LONG], **asked, **types_of(model, [LONG]), **GREEDY)
    within = rounding(model)
    assert out.logprobs[0][1:] == pytest.approx(plain_scores(model, out.tokens[0], images[:1]), abs=within)
    own = super(type(model).__mro__[1], model).generate(
        torch.tensor([LONG]),
        pixel_values=images[:1],
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **{name: torch.tensor(values) for name, values in types_of(model, [LONG]).items()},
    )
    assert out.tokens == own.tolist()
    for text in (LONG, SHORT[:-1]):
        exact = model.generate([text], **asked, **types_of(model, [text]), max_gen_len=0)
        assert exact.logprobs[0][1:] == pytest.approx(plain_scores(model, text, images[:1]), abs=within)


@pytest.mark.parametrize("side", ["left", "right", "lists"])
def test_a_ragged_batch_equals_its_rows(model, images, side):
    """Images go with their prompts, and token types are laid out as the tokens are, whatever the padding was."""
    pads = [0, 0]
    padded = [LONG, {"left": pads + SHORT, "right": SHORT + pads, "lists": SHORT}[side]]
    given = {"input_ids": padded, **types_of(model, padded), "pixel_values": images}
    if side != "lists":
        given["attention_mask"] = torch.tensor([[1] * 9, [0, 0, *[1] * 7] if side == "left" else [1] * 7 + pads])
        given |= {name: torch.tensor(given[name]) for name in given if name.endswith("_ids")}
    asked = {"echo": True, "logprobs": True, **GREEDY}
    both = model.generate(**given, **asked)
    for row, text in enumerate((LONG, SHORT)):
        alone = model.generate([text], pixel_values=images[row : row + 1], **types_of(model, [text]), **asked)
        assert both.tokens[row] == alone.tokens[0]
        assert both.logprobs[row] == pytest.approx(alone.logprobs[0], abs=rounding(model))


def test_token_types_change_what_an_image_is(images):
    """Without them Gemma 3 reads an image as text, so they are not to be left out."""
    torch.manual_seed(0)
    model = with_llama_generation(gemma3().float().eval())
    asked = {"pixel_values": images[:1], "echo": True, "logprobs": True, "max_gen_len": 0}
    without, given = model.generate([LONG], **asked), model.generate([LONG], **asked, **types_of(model, [LONG]))
    assert without.logprobs[0][4:] != pytest.approx(given.logprobs[0][4:], abs=rounding(model))


def test_what_cannot_be_had_with_images_is_refused_by_name(model, images):
    """Copies, the reference schedule of a ragged batch, and parts of what must be read as a whole."""
    typed = types_of(model, [LONG])
    for options, says in (
        (
            {"num_return_sequences": 2},
            "num_return_sequences repeats prompts, and not the (pixel_values|token_type_ids)",
        ),
        *([({"prefill_chunk_size": 3}, "prefill_chunk_size reads them in parts")] if typed else []),
        *([({"echo": True, "logprobs": True, "chunk_bytes": 1}, "not read in parts.*chunk_bytes")] if typed else []),
    ):
        with pytest.raises(ValueError, match=says):
            model.generate([LONG], pixel_values=images[:1], **typed, **options, **GREEDY)
    with pytest.raises(ValueError, match=r'needs whole prompts at once.*schedule="padded"'):
        model.generate([LONG, SHORT], pixel_values=images, schedule="reference", **GREEDY)
    if typed:
        for wrong in ([[0] * 8], "types", [[0.5] * 9], [LONG, SHORT]):
            with pytest.raises(ValueError, match="token_type_ids must hold one int for each token of each prompt"):
                model.generate([LONG], pixel_values=images[:1], token_type_ids=wrong, **GREEDY)


def test_a_batch_given_as_one_object_loses_no_image(model, images):
    """What is no id and no mask goes by name; token types that say nothing are no matter."""
    batch = {"input_ids": [LONG], "token_type_ids": [[0] * 9]}
    text = {"input_ids": [[1, 5, 6]], "token_type_ids": [[0] * 3]}
    assert model.generate(text, **GREEDY).tokens == model.generate([[1, 5, 6]], **GREEDY).tokens
    for more in ({"pixel_values": images[:1]}, {"token_type_ids": [[0, *[1] * 8]]}):
        with pytest.raises(ValueError, match=r"may hold input_ids and attention_mask alone.*as \*\*batch"):
            model.generate({**batch, **more}, **GREEDY)


def test_tokens_without_a_logit_are_read_and_never_scored():
    """Mllama embeds more ids than it scores: images are answered as transformers does, and echoed logprobs refused."""
    vision = {"vision_output_dim": 32, "image_size": 28, "patch_size": 14, "max_num_tiles": 2, "num_global_layers": 1}
    config = transformers.MllamaConfig(
        vision_config={
            **{**VISION, **vision},
            "num_hidden_layers": 2,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2]],
        },
        text_config={**TEXT, "num_key_value_heads": 1, "cross_attention_layers": [1], **SPECIAL},
        image_token_index=64,
    )
    torch.manual_seed(0)
    theirs = transformers.MllamaForConditionalGeneration(config).eval()
    ours, ids = with_llama_generation(theirs), torch.tensor([[1, 64, 5, 6]])
    image = {
        "pixel_values": torch.randn(1, 1, 2, 3, 28, 28),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0]]]),
        "cross_attention_mask": torch.ones(1, 4, 1, 2, dtype=torch.long),
        "attention_mask": torch.ones_like(ids),
    }
    expected = theirs.generate(ids, **image, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert torch.equal(ours.generate(ids, **image, **GREEDY), expected)
    for ask, way_out in (
        (lambda: ours.generate(ids, **image, **GREEDY, echo=True, logprobs=True), "without echo"),
        (lambda: ours.generate([[1], [1, 64]], **GREEDY, schedule="reference"), 'schedule="padded"'),
        (lambda: ours.score_tokens([[1, 64, 5]]), "a context of score_continuations"),
    ):
        with pytest.raises(ValueError, match=f"has none of 64, at position 1 of row .*{way_out}"):
            ask()
    after = ours(torch.tensor([[1, 64]])).logits[0, -1].detach().log_softmax(-1)[5]
    assert ours.score_continuations([[1, 64]], [[[5]]]).totals[0][0] == pytest.approx(float(after), abs=1e-5)
    with pytest.raises(ValueError, match="top_logprobs must be from 0 to 64, got 65"):
        ours.generate([[1, 64]], **GREEDY, top_logprobs=65)
