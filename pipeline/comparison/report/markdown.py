"""The comparison for the text of a pull request: reports/comparison.md."""

import pandas as pd

from pipeline.comparison.compare import Comparison
from pipeline.comparison.figures import Figures, models_table
from pipeline.comparison.report.costs import Costs, speed_note
from pipeline.comparison.report.decision_card import TITLE, DecisionCard, decision_card
from pipeline.comparison.report.int8_table import int8_table
from pipeline.comparison.report.summary import sentences
from pipeline.comparison.report.tables import (
    cache_table,
    metrics_table,
    speed_table,
    students_table,
)


def markdown(figures: Figures, comparison: Comparison, costs: Costs) -> str:
    def table(texts: pd.DataFrame) -> str:
        escaped = texts.map(
            lambda text: text.replace("|", "\\|") if isinstance(text, str) else text
        )
        return escaped.to_markdown(index=False, disable_numparse=True)

    parts = [
        "## Comparison",
        decision_text(decision_card(figures, costs.speed)),
        "All students:",
        "\n".join(f"- {line}" for line in sentences(figures, comparison, costs)),
        table(students_table(figures).rename(columns={"gain": "gain, points"})),
    ]
    for speed in costs.speed.values():
        parts += [speed_note(speed, costs), table(speed_table(speed))]
    if len(int8 := int8_table(comparison, costs.speed)):
        parts.append(table(int8))
    if costs.economics is not None:
        parts.append(table(cache_table(costs)))
    parts += [
        "<details><summary>All metrics</summary>",
        table(metrics_table(models_table(comparison))),
        "</details>\n",
    ]
    return "\n\n".join(parts)


def decision_text(card: DecisionCard) -> str:
    file = f"`{card.file}`** ({card.name})" if card.name else f"{card.file}**"
    return "\n".join([f"**{TITLE}: {file}", "", *(f"- {line}" for line in card.lines)])
