"""Tell whether a model still computes what it did: by its weights, settings, adapters and hooks.

Keys and values that outlive a call (see `prompt_cache`, `request_manager`) belong to the model as it was then. What
this module does not do: it runs no model, so it sees no change of a weight through `.data`, nor of what a hook reads;
`prompt_cache` compares a few keys for that.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

_OF_EVERY_MODULE = set(vars(torch.nn.Module()))
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class _Weight(NamedTuple):
    """A parameter or buffer, and its version when the state was taken."""

    tensor: "weakref.ref[Tensor]"
    version: int  # counts changes in place
    kind: tuple[torch.dtype, torch.device]


class ModelState:
    """A model's weights, settings and hooks at one moment, without keeping any of them alive.

    >>> state = ModelState(model)
    >>> state.holds_for(model), state.holds_for(with_llama_generation(model))
    (True, True)
    """

    def __init__(self, model: Any) -> None:
        self.weights, self.settings = _weights_of(model), tuple(_settings_of(model))

    def holds_for(self, model: Any) -> bool:
        """Whether this model has the same weights, as far as torch counts changes of them, and settings and hooks."""
        now = _weights_of(model)
        return (
            len(now) == len(self.weights)
            and all(
                old.tensor() is new.tensor() and old[1:] == new[1:] for old, new in zip(self.weights, now, strict=True)
            )
            and self.settings == tuple(_settings_of(model))
        )


def trains(model: Any) -> bool:
    """Whether a part of the model is in training mode. A twin that shares the parts does not know of a `train()`."""
    return any(module.training for module in model.modules())


def modes_of(model: Any) -> list[tuple[Any, bool]]:
    """Return which parts of the model are in training mode; `train()` would switch them all."""
    return [(module, module.training) for module in model.modules()]


def set_modes(modes: list[tuple[Any, bool]]) -> None:
    """Restore what `modes_of` returned."""
    for module, training in modes:
        module.training = training


def drops_cache(model: Any) -> bool:
    """Whether transformers drops a cache that a forward is given: in training with gradient checkpointing."""
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _weights_of(model: Any) -> list[_Weight]:
    return [
        _Weight(weakref.ref(tensor), 0 if tensor.is_inference() else tensor._version, (tensor.dtype, tensor.device))
        for tensors in (model.parameters(), model.buffers())
        for tensor in tensors
    ]


def _settings_of(model: Any) -> Iterator[Any]:
    """Yield the config, and what modules keep beside weights: classes, numbers, texts (adapters' names, scales), hooks.

    Hooks on the model, its body and its head see what goes in and out; they change no key of the layers between.
    """
    yield from _of_config(model.config)
    ends = {id(model), id(getattr(model, "base_model", None)), id(getattr(model, "lm_head", None))}
    for module in model.modules():
        own = vars(module)
        yield None if module is model else type(module)  # a twin's class is another
        for name, value in own.items():
            if name not in _OF_EVERY_MODULE and module is not model:
                yield name, _plain(value)
        if id(module) not in ends:
            yield [tuple(own[name]) for name in HOOKS if own.get(name)]  # no two hooks have one number


def _of_config(config: Any) -> Iterator[Any]:
    """Yield the fields of a config and of those in it, but `is_causal`, which transformers sets during a forward."""
    for name, value in dict(vars(config)).items():  # copied at once: another thread may be in a forward
        if hasattr(value, "to_dict"):
            yield from _of_config(value)
        elif name != "is_causal" and not name.startswith("_"):
            yield name, _plain(value)


def _plain(value: Any) -> Any:
    """Copy numbers and texts, alone or in containers; None for anything else."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return tuple((key, _plain(one)) for key, one in value.items() if isinstance(key, (int, str)))
    if isinstance(value, Set):
        return frozenset(one for one in value if isinstance(one, (int, str)))
    return tuple(map(_plain, value)) if isinstance(value, Sequence) else None
