"""Child processes that run beside one another: their lines, each after a name."""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

_NEVER = re.compile(r"(?!)")


def run_prefixed(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    hidden: tuple[str, ...] = (),
    new_name: re.Pattern[str] = _NEVER,
) -> tuple[int, str]:
    """Run a command, print its lines, each after the name, and return its exit status and the last
    name.

    Args:
        hidden: how lines begin that are left out.
        new_name: matches a line that begins another name's, its first group.
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
        if match := new_name.match(line):
            name = match[1]
        if line.strip() and not (hidden and line.strip().startswith(hidden)):
            sys.stdout.write(f"{name}: {line}")
            sys.stdout.flush()
    return process.wait(), name
