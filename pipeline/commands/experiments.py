"""List the experiments of `dvc exp run`: what each changed, and its validation accuracies.

    python -m pipeline.commands.experiments

Those of the last commit, in at most 100 columns of text; `dvc exp show` prints some 300 figures.
"""

from pipeline.runtime.command import run_command

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
from dvc.exceptions import DvcException
from dvc.repo import Repo

from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import ModelOutputs
from pipeline.runtime.params import PARAMS_FILE, student_names

WIDTH = 100
ABSENT = "-"


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.commands.experiments", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args()
    students = student_names()
    try:
        with Repo() as repo:
            states = [state.dumpd() for state in repo.experiments.show()]
    except DvcException as error:
        raise UserError(f"DVC cannot list the experiments: {error}") from None
    if not states:
        raise UserError("there is no commit yet, and so no experiment. Commit, then run one.")
    print(table(states, students))


def table(states: list[dict[str, Any]], students: list[str]) -> str:
    """A row for each experiment: its state, each student's accuracy, and the parameters that differ
    between rows. If that is too wide, the rows continue below."""
    names, params, results = [], [], []
    for name, status, content in _experiments(states):
        names.append(name)
        params.append(dict(_leaves(_of_file(content, "params", str(PARAMS_FILE)))))
        results.append([status, *(_accuracy(content, name) for name in students)])
    texts = pd.DataFrame(params, index=names).fillna(ABSENT)
    changed = texts.loc[:, texts.nunique() > 1]
    accuracies = pd.DataFrame(results, index=names, columns=["state", *students])
    return pd.concat([accuracies, changed], axis=1).to_string(line_width=WIDTH)


def _experiments(states: list[dict[str, Any]]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield the name, the state and DVC's data of the workspace, the commit and each experiment."""
    for state in states:
        yield state.get("name") or state["rev"], "", state.get("data") or {}
        for group in state.get("experiments") or []:
            last = group["revs"][0]
            status = (group.get("executor") or {}).get("state", "success")
            yield last.get("name") or last["rev"][:7], status.lower(), last.get("data") or {}


def _of_file(content: Mapping[str, Any], kind: str, path: str) -> Mapping[str, Any]:
    """What DVC read of a file; empty if it could not."""
    return (content.get(kind) or {}).get(path, {}).get("data") or {}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each parameter's dotted key and its value."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value).strip('"')


def _accuracy(content: Mapping[str, Any], student: str) -> str:
    metrics = _of_file(content, "metrics", str(ModelOutputs("distilled", student).metrics))
    accuracy = metrics.get("validation_accuracy")
    return ABSENT if accuracy is None else f"{accuracy:.2%}"


if __name__ == "__main__":
    run_command(main)
