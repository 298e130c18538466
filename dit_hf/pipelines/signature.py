# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
"""The annotations of `__init__` in the form that older versions of diffusers read."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar, Union, get_args, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])


def with_types(function: F) -> F:
    """Replace annotations that are strings by types, and `X | None` by `Optional[X]`.

    Diffusers before 0.37 reads no others of a pipeline's `__init__`, and fails for arguments that it cannot read.
    """
    function.__annotations__ = {
        name: Union.__getitem__(get_args(hint)) if isinstance(hint, types.UnionType) else hint
        for name, hint in get_type_hints(function).items()
    }
    return function
