"""Load Meta's LLAMA2 folders (``params.json``, ``consolidated.*.pth``) as a transformers model, in one process.

The shards are mapped into memory, not read, and merged one weight at a time, so memory never holds two copies of the
model. accelerate places the weights. What this module does not do: it reads no tokenizer, no transformers folder and no
GGUF file, and runs no code in a checkpoint.
"""

import math
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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

from ..generation.releases import CACHE_NAMES
from .meta_params import feed_forward_size, read_params
from .meta_shards import Shard, Weight, merged_weights, open_shards, shard_files
from .placement import AUTOMATIC, Device, DeviceMap, MaxMemory, check_device

_PROGRESS_FROM = 10**9  # bytes


def is_meta_folder(path: str | Path) -> bool:
    """Whether a path is a folder in Meta's format, whole or broken: it has shards or ``params.json``.

    Beside a transformers ``config.json`` it takes both.
    """
    folder = Path(path)
    found = (bool(shard_files(folder)), (folder / "params.json").is_file())
    return all(found) if (folder / "config.json").is_file() else any(found)


def load_meta_checkpoint(
    folder: str | Path,
    *,
    max_seq_len: int,
    vocab_size: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
    offload_folder: str | Path | None = None,
    model_class: type[LlamaForCausalLM] = LlamaForCausalLM,
) -> LlamaForCausalLM:
    """A transformers model with the weights of a LLAMA2 checkpoint in Meta's own format, however many shards it has.

    Beyond the model itself, memory holds one weight at a time, also where the model is spread, offloaded or cast. Only
    shards in torch's file format of before 1.6, which cannot be mapped, are read whole and let go weight by weight.

    Args:
        folder: holds ``params.json`` and ``consolidated.00.pth``, ``consolidated.01.pth`` and so on.
        max_seq_len: becomes ``max_position_embeddings``; Meta's format leaves it to the caller.
        vocab_size: the size, or the sizes, that the embedding may have. None: whatever it has.
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
    params = read_params(Path(folder))
    shards = open_shards(Path(folder), params)
    weights = merged_weights(shards, params, vocab_sizes=[vocab_size] if isinstance(vocab_size, int) else vocab_size)
    dtype = dtype or next(iter(shards.values()))["tok_embeddings.weight"].dtype
    with init_empty_weights():  # weights only: the rotary table is a buffer, and computed here and now
        model = model_class(_config(params, weights, max_seq_len=max_seq_len, dtype=dtype))
    devices = _devices(model, device_map, max_memory=max_memory, dtype=dtype)
    offload_to = _offload_folder(model, offload_folder) if "disk" in devices.values() else None
    _fill(model, _merged(shards, weights, dtype), devices, offload_folder=offload_to)
    if device_map is not None:
        dispatch_model(model, devices, offload_dir=offload_to, skip_keys=list(CACHE_NAMES))
    return model.eval()


def _config(params: dict[str, Any], weights: dict[str, Weight], *, max_seq_len: int, dtype: torch.dtype) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=weights["tok_embeddings.weight"].shape[0],
        hidden_size=params["dim"],
        intermediate_size=feed_forward_size(params),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params["n_kv_heads"],
        max_position_embeddings=max_seq_len,
        rms_norm_eps=params["norm_eps"],
        rope_theta=params["rope_theta"],  # the name that transformers 4 and 5 both take
        tie_word_embeddings=False,
        dtype=dtype,
    )


def _merged(
    shards: dict[str, Shard], weights: dict[str, Weight], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge the weights one by one, and free their shards' parts; yield transformers' name and the weight."""
    total = sum(math.prod(weight.shape) for weight in weights.values()) * dtype.itemsize
    disable = None if total >= _PROGRESS_FROM else True  # None: a bar on terminals only
    with logging.tqdm(total=total, desc="Loading", unit="B", unit_scale=True, disable=disable) as bar:
        for key, weight in weights.items():
            # Bind no name to a weight, here or in `_fill`: it would stay in memory beside the next one.
            yield weight.name, _merge([shard.pop(key) for shard in shards.values()], weight, dtype)
            bar.update(math.prod(weight.shape) * dtype.itemsize)


@torch.no_grad()
def _merge(parts: Sequence[torch.Tensor], weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Merge the parts of a weight: cast each, reorder its rows as transformers has them, and copy it, in one step."""
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
    """Return the device of the innermost module that has one."""
    while name not in devices and name:
        name = name.rpartition(".")[0]
    return devices[name]


def _devices(
    model: LlamaForCausalLM,
    device_map: DeviceMap | None,
    *,
    max_memory: MaxMemory | None,
    dtype: torch.dtype,
) -> dict[str, Device]:
    """Choose a device for every module of the model."""
    if device_map is None:
        return {"": "cpu"}
    if isinstance(device_map, str) and device_map in AUTOMATIC:
        return _automatic_devices(model, device_map, max_memory=max_memory, dtype=dtype)
    if not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    devices: dict[str, Device] = {name: check_device(device, "device_map") for name, device in device_map.items()}
    check_device_map(model, devices)
    return devices


def _automatic_devices(
    model: LlamaForCausalLM, kind: str, *, max_memory: MaxMemory | None, dtype: torch.dtype
) -> dict[str, Device]:
    whole = ["LlamaDecoderLayer"]
    room = None if max_memory is None else dict(max_memory)
    if kind != "sequential":
        low_zero = kind == "balanced_low_0"
        room = get_balanced_memory(model, room, no_split_module_classes=whole, dtype=dtype, low_zero=low_zero)
    devices: dict[str, Device] = infer_auto_device_map(model, room, no_split_module_classes=whole, dtype=dtype)
    return devices


def _offload_folder(model: LlamaForCausalLM, folder: str | Path | None) -> Path:
    if folder is None:
        temporary = tempfile.TemporaryDirectory(prefix="hf_llama_sampling_")
        weakref.finalize(model, temporary.cleanup)
        return Path(temporary.name)
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)
