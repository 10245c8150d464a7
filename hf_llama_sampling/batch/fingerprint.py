"""Fingerprint a model, its tokenizer and this package, so that a run is resumed only with those that began it.

Every byte of the weights counts, and everything else that changes answers; the path they were loaded from does not.
This module compares nothing and writes nothing.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from ..defaults import __version__
from ..llama.llama import Llama
from ..llama.tokenizer import TokenizerLike
from .jsonl import canonical

_PIECE = 1 << 26  # bytes of a weight that are copied at a time
_CONFIG_WITHOUT_EFFECT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
_MANY_TOKENS = 1 << 18  # limit for a tokenizer that can only be queried token by token
_PROBE = "The quick brown fox, 1234: \n\t\u00e9\u4f60\U0001f600  def f(x):\n        return x  [INST] </s>"


def fingerprint(llama: Llama) -> dict[str, Any]:
    """Return hashes and facts by name; equal fingerprints mean equal answers on equal hardware.

    Reads every weight once: about a second per gigabyte and core, with as many cores as there are.
    """
    model = llama.model
    config = {k: v for k, v in model.config.to_dict().items() if k not in _CONFIG_WITHOUT_EFFECT}
    adapters: dict[str, Any] = {name: getattr(setup, "to_dict", dict)() for name, setup in _adapters(model).items()}
    return {
        "version": __version__,
        "model": _hash(canonical(config)),
        "weights": _hash(*_digests_of_weights(model)),
        "adapters": _hash(canonical(adapters), *_adapter_states(model)) if adapters else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer": _hash(*_tokenizer_parts(llama.tokenizer)),
        "max_seq_len": llama.max_seq_len,
        "eos_token_id": llama.eos_ids,
    }


def _hash(*parts: object) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


# Weights


def _digests_of_weights(model: torch.nn.Module) -> list[str]:
    """Hash each parameter and buffer, in model order, several in parallel: hashing releases Python's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda tensor: _digest_of_tensor(tensor.name, tensor.load()), _tensors(model)))


class _Tensor(NamedTuple):
    """A parameter or buffer; `load` returns its values, even if accelerate has offloaded them."""

    name: str
    load: Callable[[], torch.Tensor]


def _tensors(model: torch.nn.Module) -> Iterator[_Tensor]:
    """Yield every parameter, buffer and other saved tensor; tensors that weights share come once."""
    seen = set()
    for prefix, module in model.named_modules():
        transient = module._non_persistent_buffers_set
        tensors = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
        if not any(module.children()):  # scales and the like, which quantized layers save beside their weights
            others = module.state_dict(keep_vars=True).items()
            tensors |= {name: value for name, value in others if isinstance(value, torch.Tensor)}
        for name, tensor in tensors.items():
            if id(tensor) in seen or (name in transient and _follows_the_text(module)):
                continue
            seen.add(id(tensor))
            load = functools.partial(_resident, module, name, tensor)
            # Unsaved buffers are computed at loading, and their last bits depend on the device.
            yield _Tensor(f"{prefix}.{name}", functools.partial(_rounded, tensor) if name in transient else load)


def _follows_the_text(module: torch.nn.Module) -> bool:
    """Find modules whose rotary factors change with the length of the text that a forward reads."""
    kinds = getattr(module, "rope_type", None)
    found = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(kind in ("dynamic", "longrope") for kind in found)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """Round floats to fewer bits (float32 keeps 12 of 23)."""
    if not values.is_floating_point():
        return values
    return ((values.detach().float().contiguous().view(torch.int32) + (1 << 10)) >> 11).cpu()


def _resident(module: torch.nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if weight.device.type == "meta" and getattr(one, "weights_map", None) is not None:
            values: torch.Tensor = one.weights_map[name]
            return values
    return weight


def _digest_of_tensor(name: str, tensor: torch.Tensor) -> str:
    digest = hashlib.blake2b(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode(), digest_size=16)
    if hasattr(tensor, "__tensor_flatten__"):  # a tensor composed of others, as in quantization
        inner, settings = tensor.__tensor_flatten__()
        parts = [_digest_of_tensor(part, getattr(tensor, part)) for part in inner]
        return _hash(digest.digest(), settings, *parts)
    values = tensor.detach().reshape(-1)
    step = max(1, _PIECE // max(1, values.element_size()))
    for start in range(0, len(values), step):
        piece = values[start : start + step].cpu().contiguous()
        digest.update(piece.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Adapters


def _adapters(model: torch.nn.Module) -> dict[str, Any]:
    found = getattr(model, "peft_config", None)
    return found if isinstance(found, dict) else {}


def _adapter_states(model: torch.nn.Module) -> Iterator[str]:
    """Describe how each layer uses its adapters, besides their weights: which are active, scaling, merged or not."""
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters"):
            states = [getattr(module, key, None) for key in ("active_adapters", "disable_adapters", "merged_adapters")]
            yield f"{name}: {states} {getattr(module, 'scaling', None)}"


# Tokenizer


def _tokenizer_parts(tokenizer: TokenizerLike) -> Iterator[object]:
    """Yield the content of a tokenizer's file; for an object with Meta's five members, the texts of its ids."""
    yield from (type(tokenizer).__name__, tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id)
    wrapped = getattr(tokenizer, "tokenizer", None)
    sentencepiece = getattr(tokenizer, "sp_model", None) or getattr(wrapped, "sp_model", None)
    rust = getattr(wrapped, "backend_tokenizer", None)
    if wrapped is not None:
        # An id may be made special after loading, and decoding then skips it.
        yield canonical([wrapped.chat_template, sorted(wrapped.all_special_ids)])
        yield [getattr(wrapped, key, None) for key in ("split_special_tokens", "add_prefix_space")]
        yield canonical({id: str(token) for id, token in getattr(wrapped, "added_tokens_decoder", {}).items()})
    if rust is not None:
        parts = json.loads(rust.to_str())
        for name in ("truncation", "padding", "post_processor"):  # not used here, and changed by use
            parts.pop(name, None)
        yield canonical(parts)
    elif sentencepiece is not None:
        yield sentencepiece.serialized_model_proto()
    elif wrapped is not None:
        yield canonical(wrapped.get_vocab())
    else:
        for token in range(min(tokenizer.n_words, _MANY_TOKENS)):
            with contextlib.suppress(Exception):  # an object of the user's, asked for ids that it may not expect
                yield f"{token} {tokenizer.decode([token])!r}"
    with contextlib.suppress(ValueError):
        yield tokenizer.encode(_PROBE, bos=False, eos=False)
