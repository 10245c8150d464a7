"""Tiny random models of many families: two layers or so, a vocabulary of 100, every one from its config alone.

What each family can break: positions (learned, ALiBi, rotary scalings that look at the text's length), windows that
forget, states that a mask does not reach, experts, caches of other shapes, forwards with other arguments.
"""

import copy
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers.models.rwkv import modeling_rwkv as rwkv

from hf_llama_sampling import with_llama_generation

VOCAB, EOS, CONTEXT, WINDOW = 100, 2, 64, 6

# A field of this name, where a family's config has one, gets this value. Families call the same thing by many names.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size"], VOCAB),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "linear_num_value_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "linear_num_key_heads"], 2),
    **dict.fromkeys(["head_dim", "linear_key_head_dim", "linear_value_head_dim", "rotary_dim"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], CONTEXT),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "state_size"], 8),
    **dict.fromkeys(["q_lora_rank"], 12),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace"], 1),
    **dict.fromkeys(["sliding_window"], WINDOW),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
KIMI = {"linear_num_heads": 4, "linear_head_dim": 8}
EACH_HEAD = {"num_key_value_heads": 4}  # latent attention repeats nothing
ALONE = {"is_encoder_decoder": False, "is_decoder": True}
DECODER = {
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    **ALONE,
    "forced_eos_token_id": None,
}
HALF = 4  # rotary factors per head: half of head_dim


def rotary(kind: str, **values: Any) -> dict[str, Any]:
    """A rotary scaling as a config field."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}}


LONGROPE = rotary(
    "longrope",
    short_factor=[1.0] * HALF,
    long_factor=[8.0] * HALF,
    original_max_position_embeddings=16,
    factor=4.0,
)

# Name of the case: the family, and fields beyond SIZES.
TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_linear": ("llama", rotary("linear", factor=2.0)),
    "llama_dynamic": ("llama", {**rotary("dynamic", factor=2.0), "max_position_embeddings": 16}),
    "llama_yarn": ("llama", rotary("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama_llama3": (
        "llama",
        rotary("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama_longrope": ("llama", LONGROPE),
    "afmoe": ("afmoe", {}),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "biogpt": ("biogpt", {}),
    "bitnet": ("bitnet", {}),
    "bloom": ("bloom", {}),  # ALiBi
    "codegen": ("codegen", {}),
    "cohere": ("cohere", {"logit_scale": 1.0}),
    "cohere2": ("cohere2", {"logit_scale": 1.0}),
    "ctrl": ("ctrl", {"dff": 48}),
    "deepseek_v2": ("deepseek_v2", EACH_HEAD),
    "deepseek_v3": ("deepseek_v3", EACH_HEAD),
    "diffllama": ("diffllama", {}),
    "doge": ("doge", {}),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", {}),
    "falcon": ("falcon", {"alibi": False}),
    "falcon_alibi": ("falcon", {"alibi": True, "new_decoder_architecture": False, "multi_query": False}),
    "falcon_h1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 64}),
    "falcon_mamba": ("falcon_mamba", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4_moe": ("glm4_moe", {}),
    "gpt2": ("gpt2", {}),  # learned positions
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": WINDOW}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}),
    "gpt_oss": ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"]}),
    "gptj": ("gptj", {}),
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", {}),
    "granitemoehybrid": ("granitemoehybrid", {**MAMBA, "layer_types": ["mamba", "attention"]}),
    "granitemoeshared": ("granitemoeshared", {}),
    "helium": ("helium", {}),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}),
    "jetmoe": ("jetmoe", {"num_key_value_heads": 4, "kv_channels": 8}),
    "kimi_linear": (
        "kimi_linear",
        {
            **EACH_HEAD,
            "linear_num_heads": 4,
            "linear_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "llama4_text": ("llama4_text", {"attention_chunk_size": 8}),
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {"num_heads": 8, "n_groups": 1, "chunk_size": 4}),
    "minimax": ("minimax", {"block_size": 4, "layer_types": ["full_attention", "linear_attention"]}),
    "ministral": ("ministral", {"layer_types": ["sliding_attention", "full_attention"]}),
    "mistral": ("mistral", {}),
    "mistral_no_window": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {}),
    "mpt": ("mpt", {"expansion_ratio": 2}),  # ALiBi
    "nanochat": ("nanochat", {}),
    "nemotron": ("nemotron", {}),
    "nemotron_h": ("nemotron_h", {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"layer_types": ["sliding_attention", "full_attention"]}),
    "olmo_hybrid": ("olmo_hybrid", {"layer_types": ["linear_attention", "full_attention"]}),
    "olmoe": ("olmoe", {}),
    "openai-gpt": ("openai-gpt", {}),
    "opt": ("opt", {"word_embed_proj_dim": 32}),  # positions from the mask
    "persimmon": ("persimmon", {}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "phi3_longrope": ("phi3", {**LONGROPE, "original_max_position_embeddings": 16}),
    "phimoe": ("phimoe", {}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_5_text": ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"]}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_next": ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}),
    "recurrent_gemma": ("recurrent_gemma", {"num_hidden_layers": 3, "attention_window_size": WINDOW, "lru_width": 32}),
    "rwkv": ("rwkv", {"attention_hidden_size": 32}),
    "seed_oss": ("seed_oss", {}),
    "smollm3": ("smollm3", {}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {}),
    "vaultgemma": ("vaultgemma", {}),
    "xglm": ("xglm", {"num_layers": 2, "attention_heads": 4}),  # sinusoidal positions
    "xlnet": ("xlnet", {"d_inner": 48}),
    "xlstm": ("xlstm", {"hidden_size": 128, "chunk_size": 4, "autocast_kernel_dtype": "float32"}),
    "zamba2": (
        "zamba2",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "hybrid_layer_ids": [1],
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "mamba_d_state": 8,
            "chunk_size": 4,
            "use_mem_rope": False,
        },
    ),
    # Decoders alone, of encoder-decoders: learned positions, or sinusoidal ones, that count columns.
    **{
        name: (name, DECODER)
        for name in ("bart", "blenderbot", "marian", "mbart", "mvp", "pegasus", "plbart", "whisper")
    },
    "trocr": ("trocr", {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}),
    "prophetnet": (
        "prophetnet",
        {"num_decoder_layers": 2, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 48, **ALONE},
    ),
    # Encoders as decoders.
    **{
        name: (name, {"is_decoder": True})
        for name in ("bert", "roberta", "big_bird", "bert-generation", "data2vec-text")
    },
    "electra": ("electra", {"is_decoder": True, "embedding_size": 32}),
    "roformer": ("roformer", {"is_decoder": True, "embedding_size": 32}),
    "bert_not_causal": ("bert", {"is_decoder": False}),
    "xlm": ("xlm", {"emb_dim": 32, "causal": True}),
    "modernbert-decoder": ("modernbert-decoder", {}),
    # Further ones, mostly relatives of those above.
    **{
        name: (name, {})
        for name in (
            "hunyuan_v1_dense",
            "hunyuan_v1_moe",
            "internlm3",
            "moshi",
            "mimo_v2_flash",
            "solar_open",
            "iquestcoder",
            "mellum",
            "exaone_moe",
            "flex_olmo",
            "granite_swa",
            "granitemoe_swa",
            "flint",
            "hyperclovax",
            "jais2",
            "kolibri1",
            "laguna",
            "minimax_m2",
            "ministral3",
            "aria_text",
            "cwm",
            "ernie4_5_moe",
            "hrm_text",
            "deepseek_v4",
            "minimax_m3_vl_text",
            "inkling2_text",
        )
    },
    # Hybrids, each with a layer of either kind.
    "bailing_hybrid": ("bailing_hybrid", {**EACH_HEAD, "layer_types": ["linear_attention", "full_attention"]}),
    "lfm3": ("lfm3", {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {"layer_types": ["linear_attention", "full_attention"]}),
    "qwen4_exp_text": (
        "qwen4_exp_text",
        {
            "layer_types": ["linear_attention", "indexed_attention"],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        },
    ),
    **{name: (name, EACH_HEAD) for name in ("minicpm3", "youtu", "axk1", "glm4_moe_lite", "deepseek_v32")},
}
_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
# Multimodal models, used for text: family of the whole, of its text tower, fields of both and of the vision tower.
TOWERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llava": ("llava", "llama", {}, {"vision_config": {"model_type": "clip_vision_model", **_CLIP}}),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"vision_config": {"model_type": "siglip_vision_model", **_CLIP}, "mm_tokens_per_image": 4},
    ),
    "qwen2_vl": (
        "qwen2_vl",
        "qwen2_vl_text",
        rotary("default", mrope_section=[2, 1, 1]),
        {"vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}},
    ),
    "mllama": (
        "mllama",
        "mllama_text_model",
        {"cross_attention_layers": [1]},
        {
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "vision_output_dim": 32,
                "intermediate_layers_indices": [0],
            }
        },
    ),
    "chameleon": (
        "chameleon",
        "",
        {
            "vocabulary_map": {
                "<image>": 99,
                **{f"IMGIMG{letter}Z": 98 - place for place, letter in enumerate("ABCD")},
            },
            "vq_config": {"embed_dim": 8, "num_embeddings": 8, "base_channels": 32, "resolution": 8},
        },
        {},
    ),
}
ALL = [*TEXT, *TOWERS]
# One of each kind. FAMILIES=all in the environment takes all.
CORE = """llama
llama_dynamic llama_llama3 llama_longrope mistral mixtral gemma2 gemma3_text qwen3_next phi phi3_longrope gpt2
gpt_neo gpt_neox gptj opt bloom mpt falcon_alibi stablelm olmo2 cohere deepseek_v3 mamba mamba2 rwkv
recurrent_gemma jamba bamba lfm2 minimax xlnet ctrl biogpt xglm gpt_oss llama4_text bart bert bert_not_causal
openai-gpt xlstm gemma3 qwen2_vl mllama chameleon moshi""".split()  # noqa: SIM905
# For tests of caches: of keys and values, of windows, of chunks, with states beside them or instead, and none.
CACHES = ["llama_longrope", "gemma2", "bloom", "lfm2", "mamba", "recurrent_gemma", "minimax", "xlnet", "bart", "moshi"]
LONG = os.environ.get("FAMILIES") == "all"
FAMILIES, CACHES = (ALL, ALL) if LONG else (CORE, CACHES)


def tiny_config(model_type: str, fields: dict[str, Any]) -> Any:
    """A config of a family, from SIZES as far as it knows them and the given fields."""
    kind = type(transformers.AutoConfig.for_model(model_type))
    known = {*getattr(kind, "__dataclass_fields__", {}), *kind.attribute_map}
    return kind(**{name: value for name, value in SIZES.items() if name in known} | fields)


@functools.cache
def build(name: str) -> Any:
    """transformers' own model of a case, seeded, in float32, its weights large enough for tokens to differ."""
    if name in TEXT:
        config, auto = tiny_config(*TEXT[name]), transformers.AutoModelForCausalLM
    else:
        whole, text, fields, others = TOWERS[name]
        auto = transformers.AutoModelForImageTextToText
        config = tiny_config(whole, fields | others)
        if text:
            config = type(config)(text_config=tiny_config(text, fields).to_dict(), **others)
    if name == "rwkv":
        rwkv.is_ninja_available = lambda: False  # it starts a process to ask
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for parameter in model.parameters():
        # The initializer's 0.02 makes all logits nearly equal; what a family sets otherwise keeps its meaning.
        if parameter.dim() > 1 and 0.01 < float(parameter.detach().std()) < 0.03:
            parameter.data.mul_(8)
    return model


def build_ours(name: str) -> Any:
    """A fresh copy with LLAMA2's `generate`: some models keep state on themselves."""
    return with_llama_generation(copy.deepcopy(build(name)))


@torch.no_grad()
def plain_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """(T, V) float32: one forward over one text, without a cache."""
    return model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float()


def rounding(model: Any, tokens: Sequence[int]) -> float:
    """How far two computations of the same logits may be apart.

    Two layers are some twelve products in a row, each a sum of at most 64 terms, each term rounded by half a float32
    step: 12 * 64 / 2 = 384 steps at the size of the largest logit, and as much again for the sum over the vocabulary.
    """
    logits = plain_logits(model, tokens)
    size = max(1.0, float(logits[logits > -1e30].abs().max()))  # Chameleon sets its image tokens to the least float
    return 2 * 384 * torch.finfo(torch.float32).eps * size
