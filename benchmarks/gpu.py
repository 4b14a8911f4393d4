"""Check and measure the pipeline on a GPU: the first command to run when one is at hand.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --tables PROJECT

Checks CUDA against the CPU: views, stages, stores, and trainings that were killed. Then measures
ratios of speed. A finished part is written at once, to results.csv and results.md in the folder
of `--out`; the same command runs the parts that are not there yet. It ends after `--minutes`.

With `--tables` it trains the pairs of the published tables instead, and appends each finished
training to PROJECT/runs.csv; the same command continues, within a training too.

Any machine runs all of it in small with `--device cpu --quick`: both sides are then the CPU.
"""

from pipeline.runtime.command import run_command

import argparse
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks import gpu_correctness, gpu_speed, gpu_tables
from benchmarks.gpu_correctness import Setting
from benchmarks.gpu_results import Results
from benchmarks.harness import Row, print_rows
from pipeline.compute.device import default_device
from pipeline.runtime.errors import UserError

OUT = Path("benchmarks/measured_on_gpu")
#: The most important first.
PARTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "views": gpu_correctness.views,
    "stages": gpu_correctness.stages,
    "resumed": gpu_correctness.resumed,
    "resnet20": gpu_speed.resnet20,
    "teacher_stage": gpu_speed.teacher_stage,
    "mobilenet_v2": gpu_speed.mobilenet_v2,
    "epoch": gpu_speed.whole_epoch,
    "compiled": gpu_speed.compiled,
}


class TimeIsUpError(BaseException):
    """The minutes are over. No `Exception`, which a part could take for its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeIsUpError in the block after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeIsUpError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def choose_device(name: str) -> torch.device:
    """Use this kind of device, and no other.

    Raises:
        UserError: it is cuda, and torch finds none.
    """
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = default_device()
    if device.type != name:
        raise UserError(
            f"torch {torch.__version__} finds no CUDA device; expected one, because this command "
            "measures a GPU. Try it in small with `--device cpu --quick`; benchmarks/README.md "
            "lists what measures a CPU."
        )
    return device


def run_parts(names: list[str], setting: Setting, results: Results) -> list[str]:
    """Run parts, and write each when it has finished; returns what was wrong, a line each."""
    problems = []
    for name in names:
        print(f"\n{name}", flush=True)
        start = time.perf_counter()
        try:
            rows = print_rows(PARTS[name](setting))
        except UserError as error:
            problems.append(f"{name}: {error}")
            print(f"  {error}", flush=True)
            continue
        except Exception as error:  # a part that fails does not keep the others from running
            problems.append(f"{name}: {type(error).__name__}")
            traceback.print_exc()
            continue
        results.add(name, rows)
        problems += [f"{name}: {row['check']}" for row in rows if row.get("holds") == "NO"]
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder (default: {OUT})")
    parser.add_argument("--minutes", type=float, default=9.0, help="at most (default: 9)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the command")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tables", type=Path, metavar="PROJECT", help="train the published pairs")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    machine += f", torch {torch.__version__}{', quick' if arguments.quick else ''}"
    if arguments.tables:
        print(machine, flush=True)
        gpu_tables.train_tables(arguments.tables, arguments.minutes, arguments.quick)
        return
    results = Results(arguments.out, machine)
    left = [name for name in arguments.parts if name not in results.parts()]
    print(f"{machine}: {len(left)} of {len(arguments.parts)} parts to run")
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(device, arguments.quick, Path(scratch))
        try:
            with time_limit(60 * arguments.minutes):
                problems = run_parts(left, setting, results)
        except TimeIsUpError:
            print(f"\n{arguments.minutes:g} minutes are over: run the same command again")
    print(f"\n`{results.page}` has {len(results.parts())} of {len(PARTS)} parts")
    if problems:
        raise UserError("\n".join([*problems, f"{len(problems)} problems; expected none."]))


if __name__ == "__main__":
    run_command(main)
