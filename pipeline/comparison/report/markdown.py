"""The comparison for the text of a pull request: reports/comparison.md."""

from collections.abc import Iterable, Mapping

from pipeline.comparison.compare import Comparison, ModelMetrics
from pipeline.comparison.report.costs import Costs, cache_rows, cost_sentences, speed_rows
from pipeline.comparison.report.numbers import millions, p_text, percent, points, whole
from pipeline.comparison.report.summary import sentences, verdict_of
from pipeline.comparison.tables import robust_figures


def markdown(comparison: Comparison, costs: Costs) -> str:
    gains = [
        {
            "student": name,
            "distilled": percent(gain.first.accuracy),
            "baseline": percent(gain.second.accuracy),
            "gain, points": points(gain.gain),
            "95 % interval": f"{points(gain.low)} to {points(gain.high)}",
            "McNemar": p_text(gain.p_value),
            "verdict": verdict_of(gain),
        }
        for name, gain in comparison.gains.items()
    ]
    summary = "\n".join(f"- {line}" for line in sentences(comparison, *cost_sentences(costs)))
    speed = "".join(
        f"Speed on {device.label}, in float32:\n\n{table(speed_rows(device))}\n"
        for device in costs.speed.values()
    )
    cache = table(cache_rows(costs)) if costs.economics else ""
    models = table(model_row(model, comparison) for model in comparison.models)
    return (
        f"## Comparison\n\n{summary}\n\n{table(gains)}\n{speed}{cache}\n"
        f"<details><summary>All metrics</summary>\n\n{models}\n</details>\n"
    )


def model_row(model: ModelMetrics, comparison: Comparison) -> dict[str, str]:
    robust = robust_figures(model, comparison.robustness).get("robust_accuracy")
    return {
        "model": model.name,
        "role": model.role,
        "accuracy": f"{percent(model.accuracy)} ({100 * model.low:.2f} to {100 * model.high:.2f})",
        "top-5": percent(model.top5),
        "NLL": f"{model.nll:.4f}",
        "ECE": percent(model.ece),
        "ECE, scaled": percent(model.ece_scaled),
        "macro-F1": percent(model.macro_f1),
        "agreement": percent(model.agreement),
        "KL": f"{model.kl:.4f}",
        "robust": percent(robust),
        "parameters": whole(model.parameters),
        "MACs": millions(model.macs),
        "bytes": whole(model.size_bytes),
    }


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """A Markdown table with the keys as its head."""
    rows = list(rows)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
