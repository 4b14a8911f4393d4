"""Logits and predicted classes as files, which say which parameters they were made from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from pipeline.data.prepared.dataset import Dataset
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json, recovery_hint, write_bytes
from pipeline.runtime.params import PARAMS_FILE
from pipeline.runtime.stage_inputs import StageInputs

HELD_OUT = ("validation", "test")


def write_predictions(
    path: Path, made_from: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Write logits or predicted classes.

    Args:
        made_from: the stage's parameters, as JSON; written beside the tensors.
    """
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    write_bytes(path, save(contiguous, {"made_from": canonical_json(made_from)}))


def read_logits(
    path: Path, stage: str, dataset: Dataset, keys: Sequence[str] = ("",)
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read raw logits of the held-out images, [N, num_classes] float32 each, and the parameters
    that they were made from.

    Args:
        stage: that wrote them, in DVC's words.
        keys: prefixes of `validation` and `test`, in a file that holds the logits of several
            networks.

    Raises:
        UserError: the file is absent or damaged, is not of these images or these parameters, or a
            number is not finite; names the command that writes it.
    """
    shapes = {
        f"{key}{name}": [len(dataset.splits[name]), dataset.num_classes]
        for key in keys
        for name in HELD_OUT
    }
    expected = ", ".join(f"{name} float32 {shape}" for name, shape in sorted(shapes.items()))
    logits, made_from = read_tensors(path, stage, expected)
    for name, of_split in logits.items():
        if not np.isfinite(of_split).all():
            raise UserError(
                f"`{path}` holds logits for {name} that are not finite: the training diverged. "
                "Lower its learning rate in params.yaml."
            )
    check_params(path, made_from, stage)
    return logits, made_from


def check_params(path: Path, made_from: Mapping[str, Any], stage: str) -> None:
    """Refuse predictions that were made from other parameters, whatever DVC has recorded."""
    params = StageInputs(*stage.split("@")).params
    for key, value in json.loads(canonical_json(params)).items():
        if key in made_from and made_from[key] != value:
            raise UserError(
                f"`{path}` was made when `{PARAMS_FILE}: {key}` was {json.dumps(made_from[key])}; "
                f"now that is {json.dumps(value)}. Run `dvc repro --force --single-item "
                f"{stage}`, then `dvc repro`."
            )


def read_tensors(
    path: Path, stage: str, *expected: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file of predictions, and the parameters that it was made from.

    Args:
        expected: names, types and shapes of the tensors; any of several.

    Raises:
        UserError: the file is absent or damaged, or holds other tensors.
    """
    try:
        tensors = load_file(path)
        with safe_open(path, "numpy") as file:
            made_from = json.loads((file.metadata() or {}).get("made_from", "{}"))
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"`{path}` is absent or damaged ({error}). {hint(path, stage)}") from None
    held = ", ".join(f"{name} {t.dtype} {list(t.shape)}" for name, t in sorted(tensors.items()))
    if held not in expected:
        raise UserError(
            f"`{path}` holds {held}; expected {expected[0]}, for the images of data/prepared. "
            f"{hint(path, stage)}"
        )
    return tensors, made_from


def hint(path: Path, stage: str) -> str:
    return recovery_hint(path, f"dvc repro --force --single-item {stage}")
