"""List, or with --remove delete, the results of students that params.yaml no longer defines.

    python -m pipeline.commands.remove_results
    python -m pipeline.commands.remove_results --remove

If such a student returns to params.yaml, `dvc repro` restores from DVC's cache what it had made.
What a stage wrote without DVC is not there. Do this before `dvc repro`: the stages `speed` and
`compare` depend on these folders, and a later change of them runs both again.
"""

from pipeline.runtime.command import run_command

import argparse

from pipeline.comparison.removed_students import REMOVE, results_of_removed_students
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.params import student_names
from pipeline.runtime.signals import remove


def main() -> None:
    parser = argparse.ArgumentParser(REMOVE, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--remove", action="store_true", help="delete what is listed")
    delete = parser.parse_args().remove
    removed = results_of_removed_students(student_names())
    paths = [path for of_student in removed.values() for path in of_student]
    for path in paths:
        if delete:
            remove(path)
            if path.exists():
                raise UserError(
                    f"`{path}` cannot be removed; expected files and folders that this user may "
                    "delete. Change their permissions, or delete them as their owner."
                )
        print(f"{'removed ' if delete else ''}{path}")
    students = counted(len(removed), "student")
    if not paths:
        print("no results of students that params.yaml no longer defines")
    elif not delete:
        print(f"results of {students}; `{REMOVE} --remove` deletes them")


if __name__ == "__main__":
    run_command(main)
