"""The comparison for a terminal."""

from pipeline.comparison.figures import Figures
from pipeline.comparison.report.costs import cache_sentence
from pipeline.comparison.report.decision_card import TITLE, DecisionCard
from pipeline.comparison.report.numbers import millions, percent
from pipeline.comparison.report.summary import gain_sentences
from pipeline.comparison.report.tables import students_table
from pipeline.runtime.errors import counted


def console_text(figures: Figures, card: DecisionCard | None) -> str:
    """metrics/comparison.json: the file to ship, a table with one line per student, and sentences.

    Args:
        card: None if the comparison has other students than those it was made for.
    """
    teacher = figures.teacher
    if teacher.parameters is None:
        size = "logits without a network"
    else:
        size = f"{counted(teacher.parameters, 'parameter')}, {millions(teacher.macs)} MACs"
    table = students_table(figures).drop(columns=["p", "retention", "its 95% interval"])
    lines = [
        *decision_lines(card),
        f"teacher: test accuracy {percent(teacher.accuracy)}, {size}",
        table.to_string(index=False),
        *gain_sentences(figures),
    ]
    if figures.cache is not None:
        lines.append(cache_sentence(figures.cache))
    return "\n".join(lines).replace("\N{MINUS SIGN}", "-")  # some terminals lack it


def decision_lines(card: DecisionCard | None) -> list[str]:
    if card is None:
        reason = "the last comparison has students that params.yaml no longer defines"
        return [f"{TITLE}: not decided, because {reason}. Run `dvc repro`."]
    name = f" ({card.name})" if card.name else ""
    return [f"{TITLE}: {card.file}{name}", *(f"  {line}" for line in card.lines)]
