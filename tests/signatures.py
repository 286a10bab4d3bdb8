"""The checker that conftest.py installs over moe_jax."""

from collections.abc import Callable

from beartype import beartype


def check(function: Callable) -> Callable:
    """Apply beartype to every function except constructors.

    JAX rebuilds registered dataclasses with leaves that are not arrays (shapes, None, tangents,
    shardings), so their fields may differ from the annotations; a NamedTuple's are not checked
    either.
    """
    if function.__name__ == "__init__":
        return function
    for name, hint in function.__annotations__.items():
        if isinstance(hint, type) and not _checkable(hint):
            function.__annotations__[name] = object
    return beartype(function)


def _checkable(hint: type) -> bool:
    """False for a Protocol that only static checkers support; beartype would refuse it."""
    try:
        isinstance(None, hint)
    except TypeError:
        return False
    return True
