"""One call at a time of what has state: a pipeline, its scheduler, a model with a cache."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# The objects that a call is using, across pipelines that share them.
_locks: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()
_locks_access = threading.Lock()


def exclusive(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Decorate a pipeline's method, which then refuses to run while another call uses the same scheduler.

    The state of a scheduler belongs to one series of steps; two of them would mix, and both images be wrong.

    Raises:
        RuntimeError: from the method, if another thread, or a callback of this one, calls it meanwhile.
        TypeError: from the method, for a prompt, which pipelines of text have.
    """

    @functools.wraps(method)
    def alone(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        for name in ("prompt", "negative_prompt"):
            if name in kwargs:
                raise TypeError(
                    f"{type(self).__name__} reads no text and has no {name}; request attributes instead: "
                    'pipe({"Smiling": True}), with the names in pipe.transformer.config.conditions'
                )
        with contextlib.ExitStack() as held:
            parts = [self, self.scheduler]
            if self._guider is not None:
                parts.append(self._guider)
            if getattr(self.transformer, "is_cache_enabled", False):
                parts.append(self.transformer)
            for part in parts:
                _acquire(part, held)
            return method(self, *args, **kwargs)

    return alone


def _acquire(part: Any, held: contextlib.ExitStack) -> None:
    """Lock `part` until `held` is closed."""
    with _locks_access:
        lock = _locks.setdefault(part, threading.Lock())
    if not lock.acquire(blocking=False):
        raise RuntimeError(
            f"this {type(part).__name__} is in use by another call, in another thread or around a callback; give each "
            "thread a pipeline with a scheduler of its own: LatentDiTPipeline(**{**pipe.components, "
            "'scheduler': CosineLatentScheduler.from_config(pipe.scheduler.config)})"
        )
    held.callback(lock.release)
