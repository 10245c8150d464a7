"""Make a view of a model for transformers' loop: the same weights, with its own settings and observer.

What this module does not do: it changes nothing in the model itself.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

from transformers import GenerationConfig


class Observer(Protocol):
    """Called by the loop in place of the model's forward, which it gets as an argument."""

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the forward, and return an output for the loop."""


def inside(around: Observer, observer: Observer | None) -> Observer:
    """Run each forward by `around`; `observer` may stand between the loop and the forward."""
    if observer is None:
        return around
    between = observer

    def observed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return between(functools.partial(around, forward), *args, **kwargs)

    return observed


def twin_of(model: Any) -> Any:
    """A shallow copy of a model, which shares all that it holds.

    `copy.copy` would call the class, and FSDP's `fully_shard` gives a model a class that cannot be called so.
    """
    twin = object.__new__(type(model))
    twin.__dict__.update(vars(model))
    return twin


def loop_view(model: Any, observer: Observer | None = None) -> Any:
    """A shallow copy of a model for one run of transformers' loop.

    Its fresh generation config keeps the checkpoint's settings out of the loop. Its forward, hooks and
    `prepare_inputs_for_generation` are the model's own, so the observer gets the model's actual inputs.
    """
    view = twin_of(model)
    view.generation_config = GenerationConfig()
    if observer is not None:
        view.__dict__["_observer"] = observer
        model_class: Any = type(model)
        view.__class__ = _observed(model_class)
    return view


@functools.cache
def _observed(model_class: Any) -> Any:
    """Derive a class whose `__call__` goes through the view's observer."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward = functools.partial(model_class.__call__, self)
        return self.__dict__["_observer"](forward, *args, **kwargs)

    return type(model_class.__name__, (model_class,), {"__module__": model_class.__module__, "__call__": call})
