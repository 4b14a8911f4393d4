"""The network and the method that the page shows beside a student's name, from params.yaml."""

from collections.abc import Mapping
from typing import Any


def network_texts(params: Mapping[str, Any]) -> dict[str, str]:
    """By student, its network and method: `mobilenet_v2, width_mult 0.5, 64 px; kd`.

    Args:
        params: all of params.yaml, checked by the stages before.
    """
    views_size = params["views"]["image_size"]
    default_method = params["distillation"].get("method", "kd")
    texts = {}
    for name, student in params["students"].items():
        network = student["network"]
        if isinstance(network, str):
            network = {"name": network}
        options = [f"{key} {value}" for key, value in network.get("options", {}).items()]
        side = network.get("input_size") or views_size
        method = student["distillation"].get("method", default_method)
        texts[name] = f"{', '.join([network['name'], *options, f'{side} px'])}; {method}"
    return texts
