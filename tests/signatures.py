"""The checker that conftest.py installs over moe_jax."""

from collections.abc import Callable

from beartype import beartype


def check(function: Callable) -> Callable:
    """beartype on every function but constructors.

    JAX rebuilds registered dataclasses around leaves that are no arrays (shapes, None, tangents,
    shardings), so their fields cannot be held to the annotations; a NamedTuple's are not either.
    """
    if function.__name__ == "__init__":
        return function
    for name, hint in function.__annotations__.items():
        if isinstance(hint, type) and not _checkable(hint):
            function.__annotations__[name] = object
    return beartype(function)


def _checkable(hint: type) -> bool:
    """False for a Protocol that is for static checkers only; beartype would refuse it."""
    try:
        isinstance(None, hint)
    except TypeError:
        return False
    return True
