"""The checker that conftest.py installs over moe_jax."""

from collections.abc import Callable

from beartype import beartype


def check(function: Callable) -> Callable:
    """beartype on every function but constructors.

    JAX rebuilds registered dataclasses around leaves that are no arrays (shapes, None, tangents,
    shardings), so their fields cannot be held to the annotations; a NamedTuple's are not either.
    """
    return function if function.__name__ == "__init__" else beartype(function)
