"""Read ``params.json`` of a LLAMA2 checkpoint in Meta's own format, check it, and fill in the defaults.

The fields are those of ``ModelArgs`` in facebookresearch/llama, llama/model.py. What this module does not do: it opens
no weights.
"""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from ..checks import ReferenceFileNotFoundError

_INTEGERS = ("dim", "n_layers", "n_heads", "multiple_of")
_REQUIRED = (*_INTEGERS, "norm_eps")
_POSITIVE_INTEGERS = (*_INTEGERS, "n_kv_heads")
_POSITIVE_NUMBERS = ("norm_eps", "ffn_dim_multiplier", "rope_theta")
_KNOWN = (*_REQUIRED, "n_kv_heads", "vocab_size", "ffn_dim_multiplier", "rope_theta", "max_seq_len", "max_batch_size")


def read_params(folder: Path) -> dict[str, Any]:
    """Read the fields of ``params.json``; optional ones that are missing get the reference's defaults.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, lacks a field, has one that LLAMA2 does not know, or a field has a bad value.
    """
    path = _params_file(folder)
    try:
        params = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        _refuse("is a JSON file", path, f"is not ({error})")
    if not isinstance(params, dict):
        _refuse("holds one JSON object", path, f"holds {type(params).__name__}")
    # Fields that are null or false count as left out.
    params = {key: value for key, value in params.items() if value is not None and value is not False}
    for key in _REQUIRED:
        if key not in params:
            _refuse(f"gives {', '.join(_REQUIRED)}", path, f"lacks {key}")
    for key, value in params.items():
        _check_field(key, value, path)
    _check_heads(params, path)
    defaults = {"n_kv_heads": params["n_heads"], "vocab_size": -1, "ffn_dim_multiplier": 1.0, "rope_theta": 10000.0}
    return defaults | params


def feed_forward_size(params: dict[str, Any]) -> int:
    """Compute the width of the feed-forward layers, as llama/model.py (``FeedForward``) does.

    >>> feed_forward_size({"dim": 4096, "multiple_of": 256, "ffn_dim_multiplier": 1.0})  # LLAMA2 7B
    11008
    >>> feed_forward_size({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3})  # LLAMA2 70B
    28672
    """
    multiple_of: int = params["multiple_of"]
    size = int(int(2 * 4 * params["dim"] / 3) * params["ffn_dim_multiplier"])
    return -(-size // multiple_of) * multiple_of


def _params_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise ReferenceFileNotFoundError(f"a checkpoint is a folder, and {str(folder)!r} is none: check the path")
    if not any(folder.iterdir()):
        raise ReferenceFileNotFoundError(
            f"a checkpoint in Meta's format holds params.json and consolidated.*.pth, and {str(folder)!r} is empty: "
            "check the path or copy the files there"
        )
    if not (folder / "params.json").is_file():
        raise ReferenceFileNotFoundError(
            f"a checkpoint in Meta's format holds a params.json, and {str(folder)!r} has none: copy the one that came "
            "with the shards"
        )
    return folder / "params.json"


def _refuse(rule: str, path: Path, found: str) -> NoReturn:
    raise ValueError(f"params.json {rule}, and {str(path)!r} {found}: copy the one that came with the shards") from None


def _check_field(key: str, value: Any, path: Path) -> None:
    if key not in _KNOWN:  # use_scaled_rope, for one, changes the result
        raise ValueError(
            f"a LLAMA2 checkpoint is described by {', '.join(_KNOWN)}, and {str(path)!r} sets {key} to {value!r}: "
            "load such a model from its transformers folder"
        )
    if key in _POSITIVE_INTEGERS and (type(value) is not int or value < 1):
        _refuse_value(f"{key} is a positive integer", path, repr(value))
    if key in _POSITIVE_NUMBERS and not _is_positive(value):
        _refuse_value(f"{key} is a positive number", path, repr(value))
    if key == "vocab_size" and (type(value) is not int or (value < 1 and value != -1)):
        _refuse_value("vocab_size is a positive integer, or -1 for the tokenizer's", path, repr(value))


def _check_heads(params: dict[str, Any], path: Path) -> None:
    dim, n_heads = params["dim"], params["n_heads"]
    n_kv_heads = params.get("n_kv_heads", n_heads)
    if dim % (2 * n_heads):
        _refuse_value("dim is a multiple of twice n_heads", path, f"dim {dim} and n_heads {n_heads}")
    if n_heads % n_kv_heads:
        _refuse_value("n_heads is a multiple of n_kv_heads", path, f"n_heads {n_heads} and n_kv_heads {n_kv_heads}")


def _refuse_value(rule: str, path: Path, found: str) -> NoReturn:
    raise ValueError(f"{rule}, and {str(path)!r} says {found}: correct it")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf  # Python's JSON reader takes NaN and Infinity
