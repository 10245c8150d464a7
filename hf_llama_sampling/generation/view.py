"""A view of a model, on which transformers' loop runs: the same weights, with settings and an observer of its own.

What this module does not do: it changes nothing about the model that it is a view of.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, Protocol

from transformers import GenerationConfig


class Observer(Protocol):
    """Something that stands between the loop and the model's forward."""

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the forward, and return an output for the loop."""


def loop_view(model: Any, observer: Observer | None = None) -> Any:
    """A shallow copy of a model for one run of transformers' loop.

    Its fresh generation config keeps the checkpoint's settings out of the loop. Its forward, its hooks and its way of
    preparing inputs are the model's own, so that the observer sees just what the loop gives to the model.
    """
    view = copy.copy(model)
    view.generation_config = GenerationConfig()
    if observer is not None:
        view.__dict__["_observer"] = observer
        model_class: Any = type(model)
        view.__class__ = _observed(model_class)
    return view


@functools.cache
def _observed(model_class: Any) -> Any:
    """The class with calls that go through the view's observer."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward = functools.partial(model_class.__call__, self)
        return self.__dict__["_observer"](forward, *args, **kwargs)

    return type(model_class.__name__, (model_class,), {"__module__": model_class.__module__, "__call__": call})
