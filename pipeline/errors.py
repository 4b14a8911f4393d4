"""A user's mistake, told in one message and without a traceback."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TypeVar

Value = TypeVar("Value")


class UserError(Exception):
    """Says what was found, what was expected and what to do next."""


@contextmanager
def reported() -> Iterator[None]:
    """Print a user's mistake, a failing disk or an interruption as one message, and exit with a
    code that is not 0."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        found = f"`{error.filename}`: {error.strerror}" if error.filename else str(error)
        sys.exit(f"error: {found}. Nothing half-written is kept; mend this and run again.")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


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
