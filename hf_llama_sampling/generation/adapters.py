"""PEFT's adapters: a PEFT model around a model of ours, and the other way round.

LoRA and its kin live in the model's own layers, so whoever calls the model calls them. Soft prompts (prompt tuning,
p-tuning, prefix tuning) live in the PEFT model alone, which hands most calls on to the model beneath. So here the model
beneath learns of them. What this module does not do: it imports no PEFT, and it runs no model.
"""

import copy
import importlib.metadata
import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar, cast

import transformers
from packaging.version import Version

from .releases import CACHE_NAME

Method = TypeVar("Method", bound=Callable[..., Any])


def soft_prompts_of(model: Any) -> Any:
    """What replaces the model's way of preparing inputs for the loop, as PEFT's soft prompts do; None if nothing."""
    if is_peft_model(model):
        return model if _is_soft_prompt(model.active_peft_config) else None
    prepare = vars(model).get("prepare_inputs_for_generation")
    owner = getattr(prepare, "__self__", prepare)
    if prepare is None or owner is model or isinstance(owner, type(model)) or isinstance(model, type(owner)):
        return None
    adapter = getattr(owner, "active_peft_config", None)
    return None if adapter is not None and not _is_soft_prompt(adapter) else owner


def refuse_lost_soft_prompts(model: Any) -> None:
    """Refuse soft prompts where PEFT hands them over under a name of the cache that transformers no longer reads."""
    if CACHE_NAME == "past_key_values" or soft_prompts_of(model) is None:
        return
    version = importlib.metadata.version("peft")
    if Version(version) < Version("0.22"):
        raise ValueError(
            f"PEFT {version} loses soft prompts under transformers {transformers.__version__}, which reads another "
            "name of the cache: take transformers 5.23, or a newer PEFT"
        )


def virtual_tokens(model: Any) -> int:
    """The number of virtual tokens that soft prompts put before each text."""
    adapter = getattr(soft_prompts_of(model), "active_peft_config", None)
    return int(getattr(adapter, "num_virtual_tokens", None) or 0)


def keeps_soft_prompts_in_cache(soft_prompts: Any) -> bool:
    """Whether soft prompts are keys and values, as in prefix tuning, and not embeddings before the text."""
    return getattr(getattr(soft_prompts, "active_peft_config", None), "peft_type", None) in (
        "PREFIX_TUNING",
        "CARTRIDGE",
    )


def mixes_adapters(model: Any) -> bool:
    """Whether PEFT told the layers an adapter for each row of this batch (`adapter_names`)."""
    if not hasattr(model, "peft_config"):
        return False
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any("adapter_names" in (getattr(hook, "keywords", None) or {}) for hook in hooks)


def is_peft_model(model: Any) -> bool:
    """Whether this is a model of PEFT around one of transformers."""
    return hasattr(model, "active_peft_config") and hasattr(model, "get_base_model")


def with_inner(peft_model: Any, change: Callable[[Any], Any]) -> Any:
    """A shallow copy of a PEFT model around a changed model of transformers; all weights are shared."""
    inner = peft_model.get_base_model()
    twin = _around(peft_model, inner, change(inner))
    if hasattr(twin, "base_model_prepare_inputs_for_generation"):
        twin.base_model_prepare_inputs_for_generation = twin.base_model.prepare_inputs_for_generation
    return twin


def _around(outer: Any, inner: Any, changed: Any) -> Any:
    """A copy of a module in which `changed` takes the place of `inner`, however deep `inner` stands."""
    if outer is inner:
        return changed
    twin = copy.copy(outer)
    name = "base_model" if "base_model" in outer._modules else "model"
    twin.__dict__["_modules"] = {**outer._modules, name: _around(outer._modules[name], inner, changed)}
    return twin


def with_soft_prompts(inner: Any, peft_model: Any) -> Any:
    """A view of the model beneath a PEFT model that prepares its inputs as PEFT's own `generate` lets it."""
    view = copy.copy(inner)
    view.prepare_inputs_for_generation = peft_model.prepare_inputs_for_generation
    if vars(peft_model).get("max_seq_len") is not None:
        view.max_seq_len = peft_model.max_seq_len
    return view


def refuse_invocation_tokens(model: Any) -> None:
    """Refuse an adapter that begins at a place in each text: it is told that place by PEFT's own loop alone."""
    configs = getattr(model, "peft_config", None)
    for name, config in configs.items() if isinstance(configs, dict) else ():
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"an adapter must apply to a whole text, but {name!r} begins at its alora_invocation_tokens: take a "
                "LoRA without them, or transformers' own model class"
            )


class _ThroughPeft:
    """A method that PEFT models hand on to the model beneath; it then runs on that model with their soft prompts.

    `PeftModel.__getattr__` asks the model beneath for what it lacks, and only that frame knows who was called.
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
    """Let a method run under the soft prompts of the PEFT model that it is called through."""
    return cast(Method, _ThroughPeft(method))


def _is_soft_prompt(config: Any) -> bool:
    return bool(getattr(config, "is_prompt_learning", False))
