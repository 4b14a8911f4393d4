"""The results of `benchmarks.gpu`: a CSV file that grows part by part, and a page of its tables."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.harness import Interval, Row, text_of
from pipeline.runtime.files import write_bytes

KEY = ["machine", "part"]
COLUMNS = [*KEY, "table", "row", "column", "value"]


class Results:
    """The rows of finished parts, in a folder, for each machine."""

    def __init__(self, folder: Path, machine: str):
        self._folder, self._machine = folder, machine

    @property
    def page(self) -> Path:
        return self._folder / "results.md"

    def parts(self) -> set[str]:
        """The parts that this machine has finished."""
        found = self._read()
        return set(found[found["machine"] == self._machine]["part"])

    def add(self, part: str, rows: Sequence[Row]) -> None:
        """Write a finished part to both files, each whole or not at all.

        Args:
            rows: tables as `harness.print_rows` takes them.
        """
        cells = [
            (self._machine, part, table, str(name), column, _plain(value))
            for row in rows
            for (table, name), *others in [list(row.items())]
            for column, value in others
        ]
        both = pd.concat([self._read(), pd.DataFrame(cells, columns=COLUMNS)])
        write_bytes(self._folder / "results.csv", both.to_csv(index=False).encode())
        write_bytes(self.page, _page(both).encode())

    def _read(self) -> pd.DataFrame:
        path = self._folder / "results.csv"
        if not path.exists():
            return pd.DataFrame(columns=COLUMNS)
        return pd.read_csv(path, dtype=str, keep_default_na=False)


def _plain(value: object) -> str:
    return str(value) if isinstance(value, Interval) else text_of(value)


def _page(cells: pd.DataFrame) -> str:
    texts = [
        "# Measured on a GPU",
        "`python -m benchmarks.gpu` writes this page from results.csv beside it; "
        "benchmarks/README.md says how.",
    ]
    for machine, of_machine in cells.groupby("machine", sort=False):
        texts.append(f"## {machine}")
        for part, of_part in of_machine.groupby("part", sort=False):
            texts.append(f"### {part}")
            for name, table in of_part.groupby("table", sort=False):
                texts += _tables(name, table)
    return "\n\n".join(texts) + "\n"


def _tables(name: str, cells: pd.DataFrame) -> list[str]:
    """A table for the rows of each set of columns."""
    columns = cells.groupby("row", sort=False)["column"].agg(tuple)
    texts = []
    for shown in dict.fromkeys(columns):
        of_rows = cells[cells["row"].map(columns) == shown]
        wide = of_rows.pivot(index="row", columns="column", values="value")
        wide = wide.reindex(index=of_rows["row"].unique(), columns=list(shown))
        wide.index.name = name
        texts.append(wide.to_markdown(disable_numparse=True))
    return texts
