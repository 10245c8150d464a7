"""Facts about a model: its vocabulary size, context, device, EOS and pad ids.

What this module does not do: it runs no model.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from ..checks import check_int, first_not_none, to_list, to_scalar
from .adapters import refuse_invocation_tokens, virtual_tokens

# Names of position tables in transformers' models, and of submodules that do not process text.
_POSITION_TABLE = re.compile(r"(^|\.)(wpe|pos_encoding|positions_embed|embed_positions|\w*position_embeddings?)$")
_OTHER_TOWER = re.compile("vision|visual|image|audio|tower")


def vocab_size_of(model: Any) -> int:
    """Return the number of ids that the model can embed: more than its config says if some are for images alone."""
    named = int(model.config.get_text_config().vocab_size)
    return max(named, _size_in(model.get_input_embeddings, "num_embeddings") or 0)


def scored_size_of(model: Any) -> int:
    """Return the number of ids that the model's logits have a place for."""
    return _size_in(model.get_output_embeddings, "out_features") or int(model.config.get_text_config().vocab_size)


def _size_in(find_layer: Callable[[], Any], name: str) -> int | None:
    """Return a size that a layer of the model names; None if it has no such layer or names none."""
    try:
        size = getattr(find_layer(), name, None)
    except NotImplementedError:
        return None
    return size if isinstance(size, int) else None


def refuse_unscored(model: Any, prompts: Sequence[Sequence[int]], use: str, way_out: str) -> None:
    """Refuse tokens that the model reads and has no logit of, such as Mllama's for images; `use` needs the logits."""
    scored = scored_size_of(model)
    if vocab_size_of(model) <= scored:
        return
    for row, prompt in enumerate(prompts):
        for position, token in enumerate(prompt[1:], 1):
            if token >= scored:
                raise ValueError(
                    f"{use} need a logit of each token, and {type(model).__name__} has none of {token}, at position "
                    f"{position} of row {row}: {way_out}"
                )


def context_of(model: Any) -> int | None:
    """Return the model's context length: the limit that `Llama` sets on its model, else the config's, or None."""
    if vars(model).get("max_seq_len") is not None:
        return int(vars(model)["max_seq_len"])
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length is not None and length > 0 else None  # XLNet's -1 stands for no limit


def check_positions(model: Any, columns: int | None, name: str = "a text with its new tokens") -> None:
    """Refuse more columns than the model's table of positions (learned or precomputed) holds, if it has one."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if columns is None or length is None or not 0 < length < columns + virtual_tokens(model):
        return
    tables = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    tables += [path for path, buffer in model.named_buffers() if buffer.dim() == 2]
    tables += ["pos_encoding" for module in model.modules() if "pos_encoding" in vars(module)]  # CTRL
    if any(_POSITION_TABLE.search(path) and not _OTHER_TOWER.search(path) for path in tables):
        raise ValueError(
            f"{name} must not exceed the {length} positions that {type(model).__name__} has a table of, got {columns}"
            f"{_beside(virtual_tokens(model))}: shorten it"
        )


def _beside(virtual: int) -> str:
    return f" beside {virtual} virtual tokens of a soft prompt" if virtual else ""


def length_limit(model: Any) -> int | None:
    """Return the length beyond which rotary factors depend on the text's length, so that caches of prefixes differ."""
    config = model.config.get_text_config()
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # One set of parameters, or one per kind of layer.
    each = [given, *(value for value in given.values() if isinstance(value, dict))]
    kinds = {parameters.get("rope_type", parameters.get("type")) for parameters in each}
    if not any(kind and ("dynamic" in kind or kind == "longrope") for kind in kinds):
        return None
    named = [
        parameters["original_max_position_embeddings"]
        for parameters in each
        if parameters.get("original_max_position_embeddings")
    ]
    fallback = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return int(min([*named, fallback])) - virtual_tokens(model)


def forget_longer_texts(model: Any) -> None:
    """Reset rotary factors that an earlier call has adapted to a longer text.

    transformers itself resets them only for a text below the length that the model was trained for.
    """
    for module in model.modules():
        trained_for = getattr(module, "original_max_seq_len", None)
        if trained_for is None or not hasattr(module, "rope_type"):
            continue
        kinds = list(module.rope_type) if isinstance(module.rope_type, dict) else [None]
        for kind in kinds:
            reached = getattr(module, f"{kind}_max_seq_len_cached" if kind else "max_seq_len_cached", 0)
            if reached > trained_for:
                factors = getattr(module, f"{kind}_inv_freq" if kind else "inv_freq")
                position = torch.zeros(1, 1, dtype=torch.long, device=factors.device)
                module(position.float()[..., None], position, **({"layer_type": kind} if kind else {}))


def check_max_seq_len(model: Any, asked: Any) -> int | None:
    """Read `max_seq_len`, the most tokens of a text, prompt included: by default the model's context, if known."""
    return context_of(model) if asked is None else check_int("max_seq_len", asked, least=1)


def device_of(model: Any) -> torch.device:
    """Return the device for token ids. accelerate runs an offloaded embedding on the first real device of its map."""
    if model.device.type != "meta":
        return torch.device(model.device)
    placed = [where for where in getattr(model, "hf_device_map", {}).values() if where not in ("cpu", "disk")]
    return torch.device(placed[0] if placed else "cpu")


def eos_ids_of(model: Any, options: dict[str, Any]) -> tuple[int, ...]:
    """Read the EOS ids, from the call, else from the checkpoint: one, several or none (an empty list, or -1)."""
    ids = first_not_none(
        options.get("eos_token_id"),
        model.generation_config.eos_token_id,
        getattr(model.config.get_text_config(), "eos_token_id", None),
        (),
    )
    listed = to_list(ids)
    if listed is None:
        listed = [] if to_scalar(ids) == -1 else [to_scalar(ids)]  # -1 usually means none
    return tuple(check_int("eos_token_id", token, least=0, most=vocab_size_of(model) - 1) for token in listed)


def pad_id_of(model: Any, options: dict[str, Any], eos_ids: tuple[int, ...]) -> int:
    """Choose the id that pads an answer's `sequences`: from the call, else the checkpoint's, else EOS, else 0."""
    return int(first_not_none(named_pad_id(model, options), *eos_ids, 0))


def named_pad_id(model: Any, options: dict[str, Any]) -> int | None:
    """Return the pad id that the call or the checkpoint names, else None."""
    pad_id = first_not_none(options.get("pad_token_id"), model.generation_config.pad_token_id)
    return None if pad_id is None else int(to_scalar(pad_id))


def refuse_unusable(model: Any) -> None:
    """Refuse a model that no method can run: an encoder-decoder, one without weights, or one with activated LoRA."""
    refuse_encoder_decoder(model)
    _refuse_without_weights(model)
    refuse_invocation_tokens(model)


def _refuse_without_weights(model: Any) -> None:
    """Refuse a model whose weights are not there (device meta), and that no hook of accelerate's fetches."""
    if model.device.type == "meta" and not any("_hf_hook" in vars(module) for module in model.modules()):
        raise ValueError(
            f"a model must hold its weights, and those of this {type(model).__name__} are on the device meta, which "
            "holds none: load it with from_pretrained"
        )


def refuse_encoder_decoder(model: Any) -> None:
    """Refuse an encoder-decoder: LLAMA2's loop continues a prompt, and a decoder beside an encoder has none."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"LLAMA2's generation needs a decoder-only model, but {type(model).__name__} is an encoder-decoder: use "
            "its own generate with LlamaTemperatureLogitsWarper and LlamaTopPLogitsWarper"
        )


def refuse_wrapper(model: Any) -> None:
    """Refuse DistributedDataParallel and the like by the way out: their `module` is the model."""
    inner = getattr(model, "module", None)
    if not hasattr(model, "config") and hasattr(inner, "config"):
        raise TypeError(
            f"{type(model).__name__} wraps a model for training and has no generate of its own: pass the model inside, "
            "which is its attribute module"
        )


def runs_in_step(model: Any, asked: bool | None) -> bool:
    """Whether all processes must forward equally often: asked for by `synced_gpus`, else as transformers tells."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if asked is not None or not several or torch.distributed.get_world_size() == 1:
        return bool(asked)
    return bool(is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def token_broadcast(model: Any) -> Callable[[Tensor], Tensor] | None:
    """Return a function that broadcasts the first rank's tokens (B,), for a tensor-parallel model; else None.

    Each rank draws from its own generator, so without it ranks would continue with different tokens.
    """
    if (getattr(model, "tp_size", None) or 1) == 1 or not torch.distributed.is_initialized():
        return None
    meshes = (getattr(parameter, "device_mesh", None) for parameter in model.parameters())
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    names = (mesh.mesh_dim_names or ()) if mesh is not None else ()
    group = None if mesh is None else mesh.get_group("tp" if "tp" in names else 0)

    def broadcast(tokens: Tensor) -> Tensor:
        tokens = tokens.contiguous()
        torch.distributed.broadcast(tokens, torch.distributed.get_global_rank(group, 0) if group else 0, group)
        return tokens

    return broadcast
