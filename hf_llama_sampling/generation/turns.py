"""Keep forwards of one model in several threads from seeing each other's changes of its config.

A step of continuous batching changes the config while it runs: `is_causal`, and paged attention where the model's own
reads no pages. Another forward in between would attend to later tokens. So such a step runs alone, and all other
forwards run side by side, a caller's own too: hooks let those wait while a manager runs. What this module does not do:
it guards no forward of the caller's that began before a manager started, or that is compiled.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .model_state import modes_of, set_modes
from .view import Observer, inside


class Turns:
    """Forwards that run side by side, or one that runs alone, in the order in which they ask."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: list[tuple[object, bool]] = []  # who waits, and whether to run alone
        self.running: set[int] = set()  # threads in a forward
        self.alone = False  # whether it is one that runs alone
        self.managers = 0  # of continuous batching that run
        self.modes: list[tuple[Any, bool]] = []  # of the model's parts before the first of them
        self.hooks: list[Any] = []  # on the model and its body, while one runs

    def begin_managing(self, model: Any) -> None:
        """Switch the model to evaluation for the time in which at least one manager runs."""
        with self.without_others():
            if not self.managers:
                self.modes = modes_of(model)
                self.hooks = _let_forwards_wait(self, model)
            self.managers += 1
            model.eval()

    def end_managing(self) -> None:
        """Restore training mode with the last manager that stops."""
        with self.without_others():
            self.managers -= 1
            if not self.managers:
                set_modes(self.modes)
                for hook in self.hooks:
                    hook.remove()
                self.modes, self.hooks = [], []

    def beside_others(self) -> contextlib.AbstractContextManager[None]:
        """Wait for a forward that runs alone."""
        return self._turn(alone=False)

    def without_others(self) -> contextlib.AbstractContextManager[None]:
        """Wait for all other forwards."""
        return self._turn(alone=True)

    @contextlib.contextmanager
    def _turn(self, *, alone: bool) -> Iterator[None]:
        thread = threading.get_ident()
        if thread in self.running:  # a hook's forward within a forward
            yield
            return
        with self.changed:
            me = (object(), alone)
            self.waiting.append(me)
            try:
                self.changed.wait_for(lambda: self._may_run(me))
                self.running.add(thread)
                self.alone = alone
            finally:
                self.waiting.remove(me)
                self.changed.notify_all()
        try:
            yield
        finally:
            with self.changed:
                self.running.remove(thread)
                self.changed.notify_all()

    def _may_run(self, me: tuple[object, bool]) -> bool:
        earlier = self.waiting[: self.waiting.index(me)]
        if me[1]:
            return not self.running and not earlier
        return not (self.running and self.alone) and not any(alone for _, alone in earlier)


def _let_forwards_wait(turns: Turns, model: Any) -> list[Any]:
    """Hook the model and its body, so that whoever calls them waits for a forward that runs alone."""
    held = threading.local()  # the turns that this thread's calls have taken

    def enter(module: Any, inputs: Any) -> None:
        if not torch.compiler.is_compiling():
            held.turns = [*getattr(held, "turns", ()), turns.beside_others()]
            held.turns[-1].__enter__()

    def leave(module: Any, inputs: Any, output: Any) -> None:
        if getattr(held, "turns", None):
            held.turns.pop().__exit__(None, None, None)

    hooks = []
    for module in {id(module): module for module in (model, model.base_model)}.values():
        hooks.append(module.register_forward_pre_hook(_Hook(enter), prepend=True))
        hooks.append(module.register_forward_hook(_Hook(leave), always_call=True))
    return hooks


class _Hook:
    """A hook of a running manager's model; in a copy of the model it does nothing."""

    def __init__(self, run: Callable[..., None] | None = None) -> None:
        self.run = run

    def __call__(self, *args: Any) -> None:
        if self.run is not None:
            self.run(*args)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _Hook, ()


_TURNS: dict[int, Turns] = {}  # by the config's id, which models that share their weights share too
_NEW = threading.Lock()


def turns_of(model: Any) -> Turns:
    """Return the turns of a model and of all that share its config."""
    key = id(model.config)
    with _NEW:
        if key not in _TURNS:
            weakref.finalize(model.config, _TURNS.pop, key, None)
            _TURNS[key] = Turns()
        return _TURNS[key]


def in_turn(model: Any, observer: Observer | None) -> Observer:
    """Let each forward of a run wait for its turn; `observer` may stand between the loop and the forward."""
    turns = turns_of(model)

    def forward_in_turn(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with turns.beside_others():
            return forward(*args, **kwargs)

    return inside(forward_in_turn, observer)
