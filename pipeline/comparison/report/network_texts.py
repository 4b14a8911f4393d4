"""The network, its start and the method that the page shows beside a student's name."""

from collections.abc import Mapping
from typing import Any

from pipeline.comparison.compare import Comparison
from pipeline.comparison.starts import FROM_SCRATCH


def network_texts(params: Mapping[str, Any], comparison: Comparison) -> dict[str, str]:
    """By student, its network and method: `mobilenet_v2, width_mult 0.5, 64 px; kd`. Between them
    is what it started from, unless every student started from scratch.

    Args:
        params: all of params.yaml, checked by the stages before.
    """
    default_method = params["distillation"].get("method", "kd")
    students = {name: gain.first for name, gain in comparison.gains.items()}
    starts = {name: m.start.text for name, m in students.items() if m.start is not None}
    if set(starts.values()) <= {FROM_SCRATCH}:
        starts = {}
    texts = {}
    for name, student in params["students"].items():
        network = student["network"]
        if isinstance(network, str):
            network = {"name": network}
        options = [f"{key} {value}" for key, value in network.get("options", {}).items()]
        size = f"{students[name].input_size} px"
        start = [starts[name]] if name in starts else []
        method = student["distillation"].get("method", default_method)
        texts[name] = "; ".join([", ".join([network["name"], *options, size]), *start, method])
    return texts
