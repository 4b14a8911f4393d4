"""Count what one training step asks of a CUDA device, on an emulated one.

    python -m benchmarks.device_operations [--of CHECKOUT]

Device operations, copies from the host in pinned and in pageable memory, waits for the device, and
bytes between host and device: of a step in each view policy, of a network's two passes, of each
method's targets and loss, and of a short training. `--of` counts the pipeline of another checkout
beside this one. An operation on many tensors at once, as of an optimiser, counts once. No kernel
runs, and no time is measured. The emulation, `../shared/cuda/emulated_cuda.py`, does not belong to
this repository.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, print_rows

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT.parent / "shared/cuda/emulated_cuda.py"


def counted(
    checkout: Path, emulator: Path, network: str = "resnet20", pixels: int = 32, batch: int = 64
) -> dict[str, dict[str, Any]]:
    """Count in a process of its own, because the emulation changes torch; the cases of each kind.
    `checkout` has the pipeline and the loops; the cases are those of this file's folder."""
    script = ROOT / "benchmarks/counted_step.py"
    arguments = [str(emulator.resolve()), network, str(pixels), str(batch)]
    result = subprocess.run(
        [sys.executable, "-P", str(script), *arguments],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout.resolve())},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


def columns(case: Mapping[str, Any]) -> dict[str, int]:
    """Operations, pinned copies, pageable copies, waits, bytes."""
    kinds = {"pinned": 0, "pageable": 0, "waits": 0}
    for what, _, count, _ in case["crossings"]:
        kinds[kind_of(what)] += count
    return {
        "operations": case["operations"],
        **kinds,
        "bytes": sum(size for *_, size in case["crossings"]),
    }


def kind_of(crossing: str) -> str:
    """`pinned`, `pageable` or `waits`, for what the emulation calls a crossing."""
    if crossing.startswith("host sync"):
        return "waits"
    return "pinned" if "pinned" in crossing else "pageable"


def rows(checkouts: Mapping[str, Path], emulator: Path) -> Iterator[Row]:
    found = {name: counted(path, emulator) for name, path in checkouts.items()}
    for kind, cases in found["now"].items():
        for name in cases:
            for checkout in found:
                case = f"{name}, {checkout}" if len(found) > 1 else name
                yield {kind: case, **columns(found[checkout][kind][name])}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.device_operations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--of", type=Path, metavar="CHECKOUT", help="also count this checkout")
    parser.add_argument("--emulator", type=Path, default=EMULATOR, help="its file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    arguments = parser.parse_args()
    if not arguments.emulator.is_file():
        sys.exit(f"error: there is no emulation at `{arguments.emulator}`: set --emulator.")
    checkouts = {"before": arguments.of, "now": ROOT} if arguments.of else {"now": ROOT}
    printed = print_rows(rows(checkouts, arguments.emulator))
    if arguments.json:
        arguments.json.write_text(json.dumps(printed, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
