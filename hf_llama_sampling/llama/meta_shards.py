"""Find the shards of a LLAMA2 checkpoint in Meta's own format, map them into memory and check them, without reading.

The format is that of facebookresearch/llama: ``Llama.build`` in llama/generation.py, and llama/model.py. What this
module does not do: it runs no code in a shard, merges nothing and places nothing.
"""

import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from ..checks import ReferenceAssertion, ReferenceFileNotFoundError, is_lfs_pointer
from .meta_params import feed_forward_size

Shard = dict[str, torch.Tensor]

# Meta's name: transformers' name, the dimensions, and the dimension that shards split (None: each holds it whole).
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
_NORM_SPREAD = 5e-2  # norms differ between shards of one model, but by less than 1e-2
_ONE_CHECKPOINT = "use the params.json and the shards of one checkpoint"
_STATE_DICT = "save the model's own state_dict"


class Weight(NamedTuple):
    """One weight of the merged model."""

    name: str  # transformers' name
    shape: tuple[int, ...]  # of the whole weight
    split: int | None  # the dimension that shards divide
    head_dim: int | None  # of a rotary weight


def shard_files(folder: Path) -> list[Path]:
    """List the files that look like shards."""
    return sorted(folder.glob("consolidated.*.pth"))


def open_shards(folder: Path, params: dict[str, Any]) -> dict[str, Shard]:
    """Open the shards in order, by file name; check keys, number of shards and norms.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a shard is not a file of tensors, or does not belong to ``params.json`` or to the others.
    """
    shards = {file.name: _open_shard(file) for file in _ordered_files(folder)}
    expected = [key for key, *_ in _layout(params["n_layers"])]
    for file, shard in shards.items():
        missing = [key for key in expected if key not in shard]
        unexpected = sorted(set(shard) - set(expected), key=str)
        if missing or unexpected:
            found = f"lacks {_some(missing)}" if missing else f"also has {_some(unexpected)}"
            raise ValueError(f"params.json asks for {len(expected)} weights, and {file} {found}: {_ONE_CHECKPOINT}")
    _check_shard_count(shards, params)
    _check_norms(shards)
    return shards


def merged_weights(
    shards: dict[str, Shard], params: dict[str, Any], *, vocab_sizes: Sequence[int] | None
) -> dict[str, Weight]:
    """Map every key of the shards to its weight in the merged model; check the shapes of the shards.

    Args:
        vocab_sizes: the sizes that the embedding may have; None for whatever it has.
    """
    rows, split = _embedding(shards, params)
    stated = [] if params["vocab_size"] == -1 else [params["vocab_size"]]
    for name, sizes in (("params.json", stated), ("the tokenizer", vocab_sizes or [])):
        if sizes and rows not in sizes:
            raise ValueError(
                f"the embedding has one row per token, and it has {rows} where {name} says {sizes[-1]}: use the "
                "tokenizer and the params.json that came with the shards"
            )
    head_dim = params["dim"] // params["n_heads"]
    size_of = {
        "vocab": rows,
        "dim": params["dim"],
        "kv_dim": params["n_kv_heads"] * head_dim,
        "hidden_dim": feed_forward_size(params),
    }
    weights = {}
    for key, name, dimensions, dim in _layout(params["n_layers"]):
        shape = tuple(size_of[dimension] for dimension in dimensions)
        weights[key] = Weight(name, shape, dim, head_dim if key.endswith(_ROTARY) else None)
    weights["tok_embeddings.weight"] = weights["tok_embeddings.weight"]._replace(split=split)
    _check_shapes(shards, weights)
    return weights


def _layout(n_layers: int) -> Iterator[tuple[str, str, tuple[str, ...], int | None]]:
    """Yield the layout of every layer's weights: Meta's key, transformers' key, dimensions, split."""
    for pattern, (name, dimensions, split) in _LAYOUT.items():
        for i in range(n_layers if "{}" in pattern else 1):
            yield f"{pattern.format(i)}.weight", f"{name.format(i)}.weight", dimensions, split


def _ordered_files(folder: Path) -> list[Path]:
    """List the shards in order: ``consolidated.NN.pth`` for every NN from 0."""
    files = shard_files(folder)
    if not files:
        raise ReferenceFileNotFoundError(
            f"a checkpoint in Meta's format holds consolidated.00.pth and so on, and {str(folder)!r} has no such file: "
            "copy the shards there"
        )
    by_number: dict[int, Path] = {}
    for file in files:
        found = re.fullmatch(r"consolidated\.(\d+)\.pth", file.name)
        if found is None or int(found[1]) in by_number:
            raise ValueError(
                f"shards are numbered from 00 (consolidated.00.pth), each once, and {str(folder)!r} holds {file.name}: "
                "move it away"
            )
        by_number[int(found[1])] = file
    for number in range(max(by_number)):
        if number not in by_number:
            raise ReferenceFileNotFoundError(
                f"shards are numbered from 00 without a gap, and {str(folder)!r} has no consolidated.{number:02d}.pth "
                f"but has {files[-1].name}: copy the missing one there"
            )
    return [by_number[number] for number in sorted(by_number)]


def _open_shard(file: Path) -> Shard:
    """Map one shard's tensors into memory, by Meta's key, without reading them."""
    try:
        shard = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception as error:  # torch's errors for a broken file have no common type: KeyError, EOFError and others
        _refuse_file(file, error)
    if not isinstance(shard, dict):
        raise ValueError(
            f"a shard is a dictionary of tensors, and {file.name} holds {type(shard).__name__}: {_STATE_DICT}"
        )
    for key, value in shard.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            found = f"dtype {value.dtype}" if isinstance(value, torch.Tensor) else f"type {type(value).__name__}"
            raise ValueError(
                f"a shard holds tensors of floating point numbers, and {key!r} in {file.name} is of {found}: "
                f"{_STATE_DICT}"
            )
        if value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(
                f"a shard holds plain tensors with their numbers, and {key!r} in {file.name} is of layout "
                f"{value.layout} on {value.device}: {_STATE_DICT}"
            )
    return {key: value for key, value in shard.items() if not str(key).endswith("rope.freqs")}  # derived, not learned


def _refuse_file(file: Path, error: Exception) -> NoReturn:
    """Word why a file was not loaded. torch names the class or function that a pickle would have called."""
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and asked:
        raise ValueError(
            f"a shard holds tensors only, and {file.name} asks to run {asked[1]}, which was not done: get the "
            "checkpoint from a source you trust"
        ) from error
    if is_lfs_pointer(file):
        raise ValueError(
            f"a shard is a file of tensors written by torch.save, and {file.name} cannot be read as one: it is a "
            "pointer of git lfs, so fetch the file itself (git lfs pull)"
        ) from None
    raise ValueError(
        f"a shard is a file of tensors written by torch.save, and {file.name} cannot be read as one "
        f"({type(error).__name__}), so nothing in it was run: copy or download it again, from a source you trust"
    ) from error


def _some(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def _check_shard_count(shards: dict[str, Shard], params: dict[str, Any]) -> None:
    """Check the number of shards by the first layer's query weights, and that it divides the heads."""
    file, first = next(iter(shards.items()))
    rows, *_ = *first["layers.0.attention.wq.weight"].shape, 0  # a tensor without dimensions fails `_check_shapes`
    if rows and params["dim"] % rows == 0 and params["dim"] // rows != len(shards):
        wanted = params["dim"] // rows
        raise ReferenceAssertion(
            f"layers.0.attention.wq.weight has {rows} of {params['dim']} rows in {file}, so the checkpoint has "
            f"{wanted} shard{'s' * (wanted != 1)}, and {len(shards)} were found: "
            f"{'copy the missing ones there' if wanted > len(shards) else 'move the others away'}"
        )
    for key in ("n_heads", "n_kv_heads"):
        if params[key] % len(shards):
            raise ValueError(
                f"{key} is a multiple of the number of shards, as each holds whole heads, and {params[key]} is none of "
                f"{len(shards)}: {_ONE_CHECKPOINT}"
            )


def _check_norms(shards: dict[str, Shard]) -> None:
    """Compare the norms, which every shard holds whole: only they tell shards of different models apart."""
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


def _embedding(shards: dict[str, Shard], params: dict[str, Any]) -> tuple[int, int]:
    """Return the whole embedding's rows, and the dimension that shards split: in LLAMA2 the second, later the first."""
    parts = [shard["tok_embeddings.weight"] for shard in shards.values()]
    if len(parts) > 1 and all(part.shape[1:] == (params["dim"],) for part in parts):
        return sum(part.shape[0] for part in parts), 0
    return parts[0].shape[0] if parts[0].dim() else 0, 1


def _check_shapes(shards: dict[str, Shard], weights: dict[str, Weight]) -> None:
    for key, weight in weights.items():
        expected = list(weight.shape)
        if weight.split is not None:
            if expected[weight.split] % len(shards):
                raise ValueError(
                    f"{key} of shape {weight.shape}, which follows from params.json, does not divide among "
                    f"{len(shards)} shards: {_ONE_CHECKPOINT}"
                )
            expected[weight.split] //= len(shards)
        for file, shard in shards.items():
            if list(shard[key].shape) != expected:
                raise ValueError(
                    f"{key} has shape {tuple(shard[key].shape)} in {file}, and {tuple(expected)} follows from "
                    f"params.json and {len(shards)} shards: {_ONE_CHECKPOINT}"
                )
