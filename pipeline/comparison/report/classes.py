"""What each network takes for what, and its precision and recall by class."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup

from pipeline.comparison.compare import Comparison, ModelMetrics
from pipeline.comparison.figures import confused_pairs
from pipeline.comparison.report import charts
from pipeline.comparison.report.numbers import percent, whole


class Confusions(NamedTuple):
    """Of the teacher or a student: by role, a heat map or a table of the most frequent ones."""

    name: str
    by_role: Mapping[str, Markup | pd.DataFrame]


def confusions(comparison: Comparison, most_classes: int, most: int) -> list[Confusions]:
    """Compare the predictions of the teacher, each student and each baseline with the labels.

    Args:
        most_classes: that a heat map shows; of more, a table has the `most` frequent confusions.
    """
    from sklearn.metrics import confusion_matrix  # noqa: PLC0415  (see `compare.py`)

    labels, names = comparison.labels, comparison.class_names
    of_teacher = confused_pairs(labels, comparison.teacher.decisions)

    def shown(model: ModelMetrics) -> Markup | pd.DataFrame:
        if len(names) > most_classes:
            table = confused_pairs(labels, model.decisions).head(most)
            columns = {
                "label": [names[label] for label, _ in table.index],
                "predicted": [names[decision] for _, decision in table.index],
                "images": table.map(whole).tolist(),
            }
            if model.role != "teacher":
                teachers = table.index.map(lambda pair: of_teacher.get(pair, 0))
                columns["by the teacher"] = [whole(count) for count in teachers]
            return pd.DataFrame(columns)
        counts = confusion_matrix(labels, model.decisions, labels=range(len(names)))
        title = " ".join(dict.fromkeys(["Labels and predictions of", model.name, model.role]))
        return charts.heat_map(counts, names, title, ("label", f"{model.role} predicts"))

    rows = [Confusions("teacher", {"teacher": shown(comparison.teacher)})]
    groups = {name: (gain.first, gain.second) for name, gain in comparison.gains.items()}
    return rows + [
        Confusions(name, {model.role: shown(model) for model in models})
        for name, models in groups.items()
    ]


def precision_and_recall(
    comparison: Comparison, most_classes: int, most: int
) -> dict[str, pd.DataFrame]:
    """Tabulate precision and recall of each student, its baseline and the teacher by class.

    Args:
        most_classes: that are all shown; of more, the `most` on which the distilled student differs
            most from the teacher, in precision or recall.
    """
    images = np.bincount(comparison.labels, minlength=len(comparison.class_names))
    teacher = comparison.teacher
    tables = {}
    for name, gain in comparison.gains.items():
        models = (gain.first, gain.second, teacher)
        classes = np.arange(len(images))
        if len(classes) > most_classes:
            student = gain.first
            differences = np.stack(
                [
                    student.class_precision - teacher.class_precision,
                    student.class_accuracy - teacher.class_accuracy,
                ]
            )
            largest = np.abs(np.nan_to_num(differences)).max(0)
            classes = np.argsort(-largest, kind="stable")[:most]
        columns = {
            "class": [comparison.class_names[c] for c in classes],
            "images": [whole(images[c]) for c in classes],
        }
        for measure, attribute in (("precision", "class_precision"), ("recall", "class_accuracy")):
            for model in models:
                shares = getattr(model, attribute)[classes]
                column = f"{measure}, {model.role}"
                columns[column] = [percent(None if np.isnan(s) else s) for s in shares]
        tables[name] = pd.DataFrame(columns)
    return tables
