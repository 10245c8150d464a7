"""Meta's LLAMA2 folders (``params.json``, ``consolidated.*.pth``) become a transformers model, in one process.

The shards are mapped into memory, not read, and one weight at a time is merged out of them: at no moment do two copies
of the model exist. Weights are placed as accelerate would place them. Tokenizers, transformers folders and GGUF files
are not its business, and no code in a checkpoint is ever run.

The format is the one that facebookresearch/llama reads: ``Llama.build`` in llama/generation.py, and llama/model.py.
"""

import json
import math
import pickle
import re
import tempfile
import weakref
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import (
    check_device_map,
    get_balanced_memory,
    offload_weight,
    save_offload_index,
    set_module_tensor_to_device,
)
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

Device = str | int | torch.device
Shard = dict[str, torch.Tensor]

_INTEGERS = ("dim", "n_layers", "n_heads", "multiple_of")
_NUMBERS = ("norm_eps",)
_REQUIRED = _INTEGERS + _NUMBERS
_KNOWN = (*_REQUIRED, "n_kv_heads", "vocab_size", "ffn_dim_multiplier", "rope_theta", "max_seq_len", "max_batch_size")

# Meta's weight: transformers' name of it, its dimensions, and which of them shards divide (None: each holds it whole).
_LAYOUT: dict[str, tuple[str, tuple[str, ...], int | None]] = {
    "tok_embeddings": ("model.embed_tokens", ("vocab", "dim"), 1),
    "norm": ("model.norm", ("dim",), None),
    "output": ("lm_head", ("vocab", "dim"), 0),
    "layers.{}.attention.wq": ("model.layers.{}.self_attn.q_proj", ("dim", "dim"), 0),
    "layers.{}.attention.wk": ("model.layers.{}.self_attn.k_proj", ("kv_dim", "dim"), 0),
    "layers.{}.attention.wv": ("model.layers.{}.self_attn.v_proj", ("kv_dim", "dim"), 0),
    "layers.{}.attention.wo": ("model.layers.{}.self_attn.o_proj", ("dim", "dim"), 1),
    "layers.{}.feed_forward.w1": ("model.layers.{}.mlp.gate_proj", ("hidden_dim", "dim"), 0),
    "layers.{}.feed_forward.w2": ("model.layers.{}.mlp.down_proj", ("dim", "hidden_dim"), 1),
    "layers.{}.feed_forward.w3": ("model.layers.{}.mlp.up_proj", ("hidden_dim", "dim"), 0),
    "layers.{}.attention_norm": ("model.layers.{}.input_layernorm", ("dim",), None),
    "layers.{}.ffn_norm": ("model.layers.{}.post_attention_layernorm", ("dim",), None),
}
_ROTARY = ("attention.wq.weight", "attention.wk.weight")

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_NORM_SPREAD = 5e-2  # in shards of one model, norms are not always equal bit for bit; they are within 1e-2
_PROGRESS_FROM = 10**9  # bytes


class _Weight(NamedTuple):
    name: str  # transformers'
    shape: tuple[int, ...]  # of the whole
    split: int | None
    head_dim: int | None  # of a rotary weight


def is_meta_folder(path: str | Path) -> bool:
    """Whether a path is a folder in Meta's format, whole or broken: it has shards or ``params.json``.

    Beside a transformers ``config.json`` it takes both.
    """
    folder = Path(path)
    found = (bool(_shard_files(folder)), (folder / "params.json").is_file())
    return all(found) if (folder / "config.json").is_file() else any(found)


def load_meta_checkpoint(
    folder: str | Path,
    *,
    max_seq_len: int,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
    device_map: Device | Mapping[str, Device] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    model_class: type[LlamaForCausalLM] = LlamaForCausalLM,
) -> LlamaForCausalLM:
    """A transformers model with the weights of a LLAMA2 checkpoint in Meta's own format, however many shards it has.

    Beyond the model itself, memory holds one weight at a time, also where the model is spread, offloaded or cast. Only
    shards in torch's file format of before 1.6, which cannot be mapped, are read whole and let go weight by weight.

    Args:
        folder: holds ``params.json`` and ``consolidated.00.pth``, ``consolidated.01.pth`` and so on.
        max_seq_len: becomes ``max_position_embeddings``; Meta's format leaves it to the caller.
        vocab_size: the tokenizer's size, which the embedding must have. None: whatever the embedding has.
        dtype: of all weights. None: that of the checkpoint's embedding.
        device_map: None for the CPU, or what transformers takes: a device, ``"auto"`` and its kin, or a mapping from
            modules to devices, ``"cpu"`` and ``"disk"`` among them.
        max_memory: what ``"auto"`` may use of each device, as in accelerate.
        offload_folder: for the modules on ``"disk"``. None: a temporary folder that lives as long as the model.
        model_class: ``LlamaForCausalLM`` or a subclass.

    Returns:
        The model, in eval mode.

    Raises:
        FileNotFoundError: the folder, ``params.json`` or a shard is missing.
        ValueError: a shard cannot be read without running code, or shards, ``params.json`` and ``vocab_size``
            contradict one another.
    """
    folder = Path(folder)
    params = _read_params(folder)
    shards = _open_shards(folder, params)
    weights = _weights(shards, params, tokenizer_size=vocab_size)
    _check_shapes(shards, weights)
    dtype = dtype or next(iter(shards.values()))["tok_embeddings.weight"].dtype
    with init_empty_weights():  # weights only: the rotary table is a buffer, and computed here and now
        model = model_class(_config(params, weights, max_seq_len=max_seq_len, dtype=dtype))
    devices = _devices(model, device_map, max_memory=max_memory, dtype=dtype)
    offload_to = _offload_folder(model, offload_folder) if "disk" in devices.values() else None
    _fill(model, _merged(shards, weights, dtype), devices, offload_folder=offload_to)
    if device_map is not None:
        dispatch_model(model, devices, offload_dir=offload_to, skip_keys="past_key_values")
    return model.eval()


def _read_params(folder: Path) -> dict[str, Any]:
    """``params.json``, checked; optional fields that it leaves out are filled in as the reference would run them."""
    path = _params_file(folder)
    try:
        params = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"params.json is a JSON file, and {str(path)!r} is not ({error}): copy the one that came with the shards"
        ) from error
    if not isinstance(params, dict):
        raise ValueError(
            f"params.json holds one JSON object, and {str(path)!r} holds {type(params).__name__}: copy the one that "
            "came with the shards"
        )
    # A field that is switched off says nothing.
    params = {key: value for key, value in params.items() if value is not None and value is not False}
    _check_params(params, path)
    return {
        "n_kv_heads": params["n_heads"],
        "vocab_size": -1,
        "ffn_dim_multiplier": 1.0,
        "rope_theta": 10000.0,
    } | params


def _params_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"a checkpoint is a folder, and {str(folder)!r} is none: check the path")
    if not any(folder.iterdir()):
        raise FileNotFoundError(
            f"a checkpoint in Meta's format holds params.json and consolidated.*.pth, and {str(folder)!r} is empty: "
            "check the path or copy the files there"
        )
    if not (folder / "params.json").is_file():
        raise FileNotFoundError(
            f"a checkpoint in Meta's format holds a params.json, and {str(folder)!r} has none: copy the one that came "
            "with the shards"
        )
    return folder / "params.json"


def _check_params(params: dict[str, Any], path: Path) -> None:
    for key in _REQUIRED:
        if key not in params:
            raise ValueError(
                f"params.json gives {', '.join(_REQUIRED)}, and {str(path)!r} lacks {key}: copy the one that "
                "came with the shards"
            )
    for key, value in params.items():
        if key in (*_INTEGERS, "n_kv_heads") and (type(value) is not int or value < 1):
            raise ValueError(f"{key} is a positive integer, and {str(path)!r} says {value!r}: correct it")
        if key in (*_NUMBERS, "ffn_dim_multiplier", "rope_theta") and not _is_positive(value):
            raise ValueError(f"{key} is a positive number, and {str(path)!r} says {value!r}: correct it")
        if key == "vocab_size" and (type(value) is not int or (value < 1 and value != -1)):
            raise ValueError(
                f"vocab_size is a positive integer, or -1 for the tokenizer's, and {str(path)!r} says {value!r}: "
                "correct it"
            )
        if key not in _KNOWN:  # use_scaled_rope, for one, changes the result
            raise ValueError(
                f"a LLAMA2 checkpoint is described by {', '.join(_KNOWN)}, and {str(path)!r} sets {key} to {value!r}: "
                "load such a model from its transformers folder"
            )
    _check_heads(params, path)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf  # JSON as Python reads it has NaN and Infinity


def _check_heads(params: dict[str, Any], path: Path) -> None:
    dim, n_heads = params["dim"], params["n_heads"]
    if dim % (2 * n_heads):
        raise ValueError(
            f"dim is a multiple of twice n_heads, and {str(path)!r} says dim {dim} and n_heads {n_heads}: correct it"
        )
    if n_heads % params.get("n_kv_heads", n_heads):
        raise ValueError(
            f"n_heads is a multiple of n_kv_heads, and {str(path)!r} says n_heads {n_heads} and n_kv_heads "
            f"{params['n_kv_heads']}: correct it"
        )


def _feed_forward_size(params: dict[str, Any]) -> int:
    """The width that llama/model.py (``FeedForward``) derives; 11008 for the 7B model, 28672 for the 70B one."""
    multiple_of: int = params["multiple_of"]
    size = int(int(2 * 4 * params["dim"] / 3) * params["ffn_dim_multiplier"])
    return -(-size // multiple_of) * multiple_of


def _config(
    params: dict[str, Any], weights: dict[str, _Weight], *, max_seq_len: int, dtype: torch.dtype
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=weights["tok_embeddings.weight"].shape[0],
        hidden_size=params["dim"],
        intermediate_size=_feed_forward_size(params),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params["n_kv_heads"],
        max_position_embeddings=max_seq_len,
        rms_norm_eps=params["norm_eps"],
        rope_theta=params["rope_theta"],  # the name that transformers 4 and 5 both take
        tie_word_embeddings=False,
        dtype=dtype,
    )


def _shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("consolidated.*.pth"))


def _ordered_shard_files(folder: Path) -> list[Path]:
    """The shards in order; ``consolidated.NN.pth`` for every NN from 0."""
    files = _shard_files(folder)
    if not files:
        raise FileNotFoundError(
            f"a checkpoint in Meta's format holds consolidated.00.pth and so on, and {str(folder)!r} has no such file: "
            "copy the shards there"
        )
    numbers = []
    for file in files:
        found = re.fullmatch(r"consolidated\.(\d+)\.pth", file.name)
        if found is None or int(found[1]) in numbers:
            raise ValueError(
                f"shards are numbered from 00 (consolidated.00.pth), each once, and {str(folder)!r} holds {file.name}: "
                "move it away"
            )
        numbers.append(int(found[1]))
    for number in range(max(numbers)):
        if number not in numbers:
            raise FileNotFoundError(
                f"shards are numbered from 00 without a gap, and {str(folder)!r} has no consolidated.{number:02d}.pth "
                f"but has {files[-1].name}: copy the missing one there"
            )
    return [file for _, file in sorted(zip(numbers, files, strict=True))]


def _open_shards(folder: Path, params: dict[str, Any]) -> dict[str, Shard]:
    """File name to tensors, in order, mapped and not yet read. Keys, number of shards and norms are checked."""
    shards = {file.name: _open_shard(file) for file in _ordered_shard_files(folder)}
    expected = [key for key, *_ in _layout(params["n_layers"])]
    for file, shard in shards.items():
        _check_keys(shard, expected, file)
    _check_shard_count(shards, params)
    _check_norms(shards)
    return shards


def _open_shard(file: Path) -> Shard:
    try:
        shard = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception as error:  # what torch raises for a broken file has no common type: KeyError and EOFError are seen
        raise ValueError(_refusal(file, error)) from error
    if not isinstance(shard, dict):
        raise ValueError(
            f"a shard is a dictionary of tensors, and {file.name} holds {type(shard).__name__}: save the model's "
            "state_dict"
        )
    for key, value in shard.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            found = f"dtype {value.dtype}" if isinstance(value, torch.Tensor) else f"type {type(value).__name__}"
            raise ValueError(
                f"a shard holds tensors of floating point numbers, and {key!r} in {file.name} is of {found}: save the "
                "model's own state_dict"
            )
        if value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(
                f"a shard holds plain tensors with their numbers, and {key!r} in {file.name} is of layout "
                f"{value.layout} on {value.device}: save the model's own state_dict"
            )
    return {key: value for key, value in shard.items() if not str(key).endswith("rope.freqs")}  # derived, not learned


def _refusal(file: Path, error: Exception) -> str:
    """Why a file was not loaded. torch names the class or function that a pickle would have called."""
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and asked:
        return (
            f"a shard holds tensors only, and {file.name} asks to run {asked[1]}, which was not done: get the "
            "checkpoint from a source you trust"
        )
    return (
        f"a shard is a file of tensors written by torch.save, and {file.name} cannot be read as one "
        f"({type(error).__name__}), so nothing in it was run: copy or download it again, from a source you trust"
    )


def _layout(n_layers: int) -> Iterator[tuple[str, str, tuple[str, ...], int | None]]:
    """The lines of the layout for every layer: Meta's key, transformers' key, dimensions, split."""
    for pattern, (name, dimensions, split) in _LAYOUT.items():
        for i in range(n_layers if "{}" in pattern else 1):
            yield f"{pattern.format(i)}.weight", f"{name.format(i)}.weight", dimensions, split


def _check_keys(shard: Shard, expected: Sequence[str], file: str) -> None:
    missing = [key for key in expected if key not in shard]
    if missing:
        raise ValueError(
            f"params.json asks for {len(expected)} weights, and {file} lacks {_some(missing)}: use the "
            "params.json and the shards of one checkpoint"
        )
    unexpected = sorted(set(shard) - set(expected), key=str)
    if unexpected:
        raise ValueError(
            f"params.json asks for {len(expected)} weights, and {file} also has {_some(unexpected)}: use the "
            "params.json and the shards of one checkpoint"
        )


def _some(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def _check_shard_count(shards: dict[str, Shard], params: dict[str, Any]) -> None:
    """The query weights of the first layer tell how many shards there were; their heads must divide among them."""
    file, first = next(iter(shards.items()))
    rows, *_ = *first["layers.0.attention.wq.weight"].shape, 0  # a shape that tells nothing is refused with the others
    if rows and params["dim"] % rows == 0 and params["dim"] // rows != len(shards):
        raise ValueError(
            f"layers.0.attention.wq.weight has {rows} of {params['dim']} rows in {file}, so the checkpoint has "
            f"{params['dim'] // rows} shard{'s' * (params['dim'] != rows)}, and {len(shards)} were found: "
            f"{'copy the missing ones there' if params['dim'] // rows > len(shards) else 'move the others away'}"
        )
    for key in ("n_heads", "n_kv_heads"):
        if params[key] % len(shards):
            raise ValueError(
                f"{key} is a multiple of the number of shards, as each holds whole heads, and {params[key]} is none of "
                f"{len(shards)}: use the params.json and the shards of one checkpoint"
            )


def _check_norms(shards: dict[str, Shard]) -> None:
    """Norms are in every shard: the one thing that tells shards of different models apart."""
    name, first = next(iter(shards.items()))
    for key in [key for key in first if key.endswith("norm.weight")]:
        for file, shard in list(shards.items())[1:]:
            same_shape = shard[key].shape == first[key].shape
            both = shard[key].float(), first[key].float()
            if same_shape and not torch.allclose(*both, atol=_NORM_SPREAD, equal_nan=True):
                raise ValueError(
                    f"every shard holds the same norms, and {key} differs between {name} and {file}: use the shards of "
                    "one checkpoint"
                )


def _weights(shards: dict[str, Shard], params: dict[str, Any], *, tokenizer_size: int | None) -> dict[str, _Weight]:
    """What every key of the shards stands for in the merged model."""
    rows, split = _embedding(shards, params)
    for name, size in (("params.json", params["vocab_size"]), ("the tokenizer", tokenizer_size)):
        if size not in (None, -1, rows):
            raise ValueError(
                f"the embedding has one row per token, and it has {rows} where {name} says {size}: use the tokenizer "
                "and the params.json that came with the shards"
            )
    head_dim = params["dim"] // params["n_heads"]
    sizes = {
        "vocab": rows,
        "dim": params["dim"],
        "kv_dim": params["n_kv_heads"] * head_dim,
        "hidden_dim": _feed_forward_size(params),
    }
    weights = {}
    for key, name, dimensions, dim in _layout(params["n_layers"]):
        shape = tuple(sizes[dimension] for dimension in dimensions)
        weights[key] = _Weight(name, shape, dim, head_dim if key.endswith(_ROTARY) else None)
    weights["tok_embeddings.weight"] = weights["tok_embeddings.weight"]._replace(split=split)
    return weights


def _embedding(shards: dict[str, Shard], params: dict[str, Any]) -> tuple[int, int]:
    """Rows of the whole embedding, and the dimension that shards divide: in LLAMA2 the second, later the first."""
    parts = [shard["tok_embeddings.weight"] for shard in shards.values()]
    if len(parts) > 1 and all(part.shape[1:] == (params["dim"],) for part in parts):
        return sum(part.shape[0] for part in parts), 0
    return parts[0].shape[0] if parts[0].dim() else 0, 1


def _check_shapes(shards: dict[str, Shard], weights: dict[str, _Weight]) -> None:
    for key, weight in weights.items():
        expected = list(weight.shape)
        if weight.split is not None:
            if expected[weight.split] % len(shards):
                raise ValueError(
                    f"{key} of shape {weight.shape}, which follows from params.json, does not divide among "
                    f"{len(shards)} shards: use the params.json and the shards of one checkpoint"
                )
            expected[weight.split] //= len(shards)
        for file, shard in shards.items():
            if list(shard[key].shape) != expected:
                raise ValueError(
                    f"{key} has shape {tuple(shard[key].shape)} in {file}, and {tuple(expected)} follows from "
                    f"params.json and {len(shards)} shards: use the params.json and the shards of one checkpoint"
                )


# Merging and placing


def _merged(
    shards: dict[str, Shard], weights: dict[str, _Weight], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """transformers' names and whole weights, one after the other; takes each out of the shards."""
    total = sum(math.prod(weight.shape) for weight in weights.values()) * dtype.itemsize
    # disable=None: no bar where stderr is no terminal
    disable = None if total >= _PROGRESS_FROM else True
    with logging.tqdm(total=total, desc="Loading", unit="B", unit_scale=True, disable=disable) as bar:
        for key, weight in weights.items():
            # No name is bound to a weight here, nor one kept in `_fill`: it would live on beside the next one.
            yield weight.name, _merge([shard.pop(key) for shard in shards.values()], weight, dtype)
            bar.update(math.prod(weight.shape) * dtype.itemsize)


@torch.no_grad()
def _merge(parts: Sequence[torch.Tensor], weight: _Weight, dtype: torch.dtype) -> torch.Tensor:
    """One whole weight; each part is cast, put into transformers' row order and copied to its place in one go."""
    merged = torch.empty(weight.shape, dtype=dtype)
    places = [merged] if weight.split is None else merged.chunk(len(parts), dim=weight.split)
    for place, part in zip(places, parts, strict=False):  # of a replicated weight, the first part
        if weight.head_dim is None:
            place.copy_(part)
        else:
            # Rows of a head, before: x0 y0 x1 y1 ... (the pairs that are rotated); after: x0 x1 ... y0 y1 ...
            halves = place.view(-1, 2, weight.head_dim // 2, place.shape[1])
            halves.copy_(part.reshape(-1, weight.head_dim // 2, 2, part.shape[1]).transpose(1, 2))
    return merged


def _fill(
    model: LlamaForCausalLM,
    merged: Iterator[tuple[str, torch.Tensor]],
    devices: Mapping[str, Device],
    *,
    offload_folder: Path | None,
) -> None:
    offloaded: dict[str, dict[str, Any]] = {}
    for name, tensor in merged:
        device = _device_of(name, devices)
        if device == "disk":
            offload_weight(tensor, name, offload_folder, index=offloaded)
            device = "meta"
        # accelerate's clear_cache collects garbage at every call: minutes for a large model
        set_module_tensor_to_device(model, name, device, value=tensor, dtype=tensor.dtype, clear_cache=False)
        del tensor
    if offloaded:
        save_offload_index(offloaded, offload_folder)


def _device_of(name: str, devices: Mapping[str, Device]) -> Device:
    """That of the innermost module that has one."""
    while name not in devices and name:
        name = name.rpartition(".")[0]
    return devices[name]


def _devices(
    model: LlamaForCausalLM,
    device_map: Device | Mapping[str, Device] | None,
    *,
    max_memory: Mapping[int | str, int | str] | None,
    dtype: torch.dtype,
) -> dict[str, Device]:
    """Modules to devices, the whole model covered."""
    if device_map is None:
        return {"": "cpu"}
    if isinstance(device_map, str) and device_map in _AUTOMATIC:
        return _automatic_devices(model, device_map, max_memory=max_memory, dtype=dtype)
    if not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    devices = {name: _checked_device(device) for name, device in device_map.items()}
    check_device_map(model, devices)
    return devices


def _automatic_devices(
    model: LlamaForCausalLM, kind: str, *, max_memory: Mapping[int | str, int | str] | None, dtype: torch.dtype
) -> dict[str, Device]:
    whole = ["LlamaDecoderLayer"]
    room = None if max_memory is None else dict(max_memory)
    if kind != "sequential":
        low_zero = kind == "balanced_low_0"
        room = get_balanced_memory(model, room, no_split_module_classes=whole, dtype=dtype, low_zero=low_zero)
    devices: dict[str, Device] = infer_auto_device_map(model, room, no_split_module_classes=whole, dtype=dtype)
    return devices


def _checked_device(device: Device) -> Device:
    """A device in accelerate's spelling: a string or a number."""
    if device == "disk" or isinstance(device, int):
        return device
    try:
        return str(torch.device(device))
    except RuntimeError as error:
        raise ValueError(
            f"a device map gives 'auto', 'balanced', 'balanced_low_0', 'sequential' or devices, and {device!r} is "
            "none: use 'auto', 'cpu', 'disk' or a name such as 'cuda:0'"
        ) from error


def _offload_folder(model: LlamaForCausalLM, folder: str | Path | None) -> Path:
    if folder is None:
        temporary = tempfile.TemporaryDirectory(prefix="hf_llama_sampling_")
        weakref.finalize(model, temporary.cleanup)
        return Path(temporary.name)
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)
