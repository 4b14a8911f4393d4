"""Child processes that run beside one another: their lines, each after a name."""

import subprocess
import sys
from collections.abc import Mapping, Sequence


def run_prefixed(
    name: str, command: Sequence[str], environment: Mapping[str, str], hidden: tuple[str, ...] = ()
) -> int:
    """Run a command, print its lines, each after the name, and return its exit status.

    Args:
        hidden: how lines begin that are left out.
    """
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    for line in process.stdout:
        if line.strip() and not (hidden and line.strip().startswith(hidden)):
            sys.stdout.write(f"{name}: {line}")
            sys.stdout.flush()
    return process.wait()
