"""Errors that are a user's to fix, and suggestions for misspelt names."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TypeVar

Value = TypeVar("Value")


class UserError(Exception):
    """Says what was found, what was expected and what to do next."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?` for the nearest of the known names, or nothing."""
    nearest = get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(f'`{n}`' for n in nearest)}?" if nearest else ""


def look_up(family: str, network: str, networks: Mapping[str, Value]) -> Value:
    """What a family of networks knows by a name.

    Raises:
        UserError: it knows no such name.
    """
    if network not in networks:
        raise UserError(
            f"family `{family}` has no network `{network}`"
            f"{did_you_mean(network, list(networks)) or '.'} Known: {', '.join(networks)}."
        )
    return networks[network]
