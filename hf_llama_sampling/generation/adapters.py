"""PEFT's adapters: a PEFT model around a model of ours, and the other way round.

LoRA and the like live in the base model's layers, so every forward applies them. Soft prompts (prompt tuning, p-tuning,
prefix tuning) live in the PEFT wrapper, which forwards most calls to the base model; this module passes them on
(`through_peft`). `generate` needs no `through_peft`: PEFT has a `generate` of its own, which replaces the base model's
`prepare_inputs_for_generation` while it runs. What this module does not do: it imports no PEFT, and it runs no model.
"""

import importlib.metadata
import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar, cast

import transformers
from packaging.version import Version

from .releases import CACHE_NAME
from .view import twin_of

Method = TypeVar("Method", bound=Callable[..., Any])


def soft_prompts_of(model: Any) -> Any:
    """Return the object (a PEFT model, usually) that overrides `prepare_inputs_for_generation`, else None."""
    if is_peft_model(model):
        return model if _is_soft_prompt(model.active_peft_config) else None
    prepare = vars(model).get("prepare_inputs_for_generation")
    owner = getattr(prepare, "__self__", prepare)
    if prepare is None or owner is model or isinstance(owner, type(model)) or isinstance(model, type(owner)):
        return None
    adapter = getattr(owner, "active_peft_config", None)
    return None if adapter is not None and not _is_soft_prompt(adapter) else owner


def refuse_lost_soft_prompts(model: Any) -> None:
    """Refuse soft prompts with PEFT < 0.22 on transformers >= 5.24, which no longer reads PEFT's `past_key_values`."""
    if CACHE_NAME == "past_key_values" or soft_prompts_of(model) is None:
        return
    version = importlib.metadata.version("peft")
    if Version(version) < Version("0.22"):
        raise ValueError(
            f"PEFT {version} loses soft prompts under transformers {transformers.__version__}, which reads another "
            "name of the cache: take transformers 5.23, or a newer PEFT"
        )


def virtual_tokens(model: Any) -> int:
    """Return the number of virtual tokens that soft prompts put before each text."""
    adapter = getattr(soft_prompts_of(model), "active_peft_config", None)
    return int(getattr(adapter, "num_virtual_tokens", None) or 0)


def keeps_soft_prompts_in_cache(soft_prompts: Any) -> bool:
    """Whether soft prompts are cached keys and values (prefix tuning), not embeddings before the text."""
    return getattr(getattr(soft_prompts, "active_peft_config", None), "peft_type", None) in (
        "PREFIX_TUNING",
        "CARTRIDGE",
    )


def mixes_adapters(model: Any) -> bool:
    """Whether rows of this batch use different adapters (PEFT's `adapter_names`)."""
    if not hasattr(model, "peft_config"):
        return False
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any("adapter_names" in (getattr(hook, "keywords", None) or {}) for hook in hooks)


def is_peft_model(model: Any) -> bool:
    """Whether this is a PEFT model around a transformers model."""
    return hasattr(model, "active_peft_config") and hasattr(model, "get_base_model")


def with_inner(peft_model: Any, change: Callable[[Any], Any]) -> Any:
    """Copy a PEFT model around `change(base model)`; the copies are shallow and share all weights."""
    inner = peft_model.get_base_model()
    twin = _around(peft_model, inner, change(inner))
    if hasattr(twin, "base_model_prepare_inputs_for_generation"):
        twin.base_model_prepare_inputs_for_generation = twin.base_model.prepare_inputs_for_generation
    return twin


def _around(outer: Any, inner: Any, changed: Any) -> Any:
    """Copy a module with its submodule `inner`, at any depth, replaced by `changed`."""
    if outer is inner:
        return changed
    twin = twin_of(outer)
    name = "base_model" if "base_model" in outer._modules else "model"
    twin.__dict__["_modules"] = {**outer._modules, name: _around(outer._modules[name], inner, changed)}
    return twin


def with_soft_prompts(inner: Any, peft_model: Any) -> Any:
    """Copy the base model, and let PEFT prepare the copy's inputs, as PEFT's own `generate` does."""
    view = twin_of(inner)
    view.prepare_inputs_for_generation = peft_model.prepare_inputs_for_generation
    if vars(peft_model).get("max_seq_len") is not None:
        view.max_seq_len = peft_model.max_seq_len
    return view


def refuse_invocation_tokens(model: Any) -> None:
    """Refuse activated LoRA (aLoRA): only PEFT's own loop tells it where in a text to start."""
    configs = getattr(model, "peft_config", None)
    for name, config in configs.items() if isinstance(configs, dict) else ():
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"an adapter must apply to a whole text, but {name!r} begins at its alora_invocation_tokens: take a "
                "LoRA without them, or transformers' own model class"
            )


class _ThroughPeft:
    """Descriptor of a method that, called through a PEFT model, runs on the base model with PEFT's soft prompts.

    `PeftModel.__getattr__` fetches missing methods from the base model, so look one frame up for the PEFT model.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method
        self.__doc__ = method.__doc__

    def __get__(self, model: Any, owner: Any = None) -> Any:
        if model is None:
            return self.method
        caller = sys._getframe(1)
        asked = caller.f_locals.get("self") if caller.f_code.co_name == "__getattr__" else None
        if asked is not None and is_peft_model(asked) and asked.get_base_model() is model:
            model = with_soft_prompts(model, asked)
        return types.MethodType(self.method, model)


def through_peft(method: Method) -> Method:
    """Decorate a method to apply the soft prompts of the PEFT model that it is called through."""
    return cast(Method, _ThroughPeft(method))


def _is_soft_prompt(config: Any) -> bool:
    return bool(getattr(config, "is_prompt_learning", False))
