"""The comparison for a terminal."""

from pipeline.comparison.figures import Figures
from pipeline.comparison.report.costs import cache_sentence
from pipeline.comparison.report.numbers import millions, percent
from pipeline.comparison.report.summary import gain_sentences
from pipeline.comparison.report.tables import students_table
from pipeline.runtime.errors import counted


def console_table(figures: Figures) -> str:
    """metrics/comparison.json as a table with one line per student, and in sentences."""
    teacher = figures.teacher
    if teacher.parameters is None:
        size = "logits without a network"
    else:
        size = f"{counted(teacher.parameters, 'parameter')}, {millions(teacher.macs)} MACs"
    table = students_table(figures).drop(columns=["McNemar", "retention"])
    lines = [
        f"teacher: test accuracy {percent(teacher.accuracy)}, {size}",
        table.to_string(index=False),
        *gain_sentences(figures),
    ]
    if figures.cache is not None:
        lines.append(cache_sentence(figures.cache))
    return "\n".join(lines).replace("\N{MINUS SIGN}", "-")  # some terminals lack it
