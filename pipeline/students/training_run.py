"""What surrounds the loop of a student or a baseline: its network, its saved state, its outputs."""

import csv
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.compute.distributed import ProcessGroup
from pipeline.data.prepared.dataset import Dataset
from pipeline.models import checkpoint
from pipeline.models.checkpoint import WEIGHTS
from pipeline.models.evaluation import count_parameters_and_macs, write_predictions
from pipeline.models.spec import ModelSpec, build, family_module, model_spec
from pipeline.runtime.files import atomic_directory, write_bytes, write_json
from pipeline.runtime.locks import exclusive
from pipeline.runtime.outputs import ModelOutputs
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.students.loop import TrainingResult, evaluate
from pipeline.students.params import StudentParams, TrainingParams
from pipeline.training.resume import ResumeState, fingerprint


def build_network(
    outputs: ModelOutputs,
    student: StudentParams,
    params: TrainingParams,
    dataset: Dataset,
    device: torch.device,
    group: ProcessGroup,
) -> tuple[nn.Module, ModelSpec]:
    """The student's network with its first weights, equal on every rank.

    Raises:
        UserError: the network cannot be built.
    """
    torch.manual_seed(params.seed)
    with group.main_process_first():
        spec = model_spec(student.family, student.network, dataset)
        network = build(spec).to(device)
    if group.is_main:
        stage = outputs.stage.replace("@", " ")
        print(f"{stage}: {student.family}, {student.network.name}", flush=True)
    return network, spec


@contextmanager
def resumable(
    outputs: ModelOutputs,
    spec: ModelSpec,
    params: TrainingParams,
    dataset: Dataset,
    inputs: Mapping[str, Any],
    device: torch.device,
    group: ProcessGroup,
) -> Iterator[ResumeState]:
    """Where the training keeps its state until the outputs are written.

    Args:
        inputs: everything else that defines the training, as JSON: a state of other inputs is
            not resumed.

    Raises:
        UserError: another run trains this model now.
    """
    fields = {
        "network": asdict(spec),
        "training": params.model_dump(),
        "dataset": dataset.fingerprint,
        **inputs,
    }
    scratch = outputs.scratch
    lock = exclusive(scratch) if group.is_main else nullcontext()
    with lock, group.report_peer_failure():
        resume = ResumeState(scratch, fingerprint(fields, device, group), group)
        yield resume
        resume.remove()


def write_result(
    outputs: ModelOutputs,
    result: TrainingResult,
    network: nn.Module,
    spec: ModelSpec,
    dataset: Dataset,
    inputs: StageInputs,
    device: torch.device,
    group: ProcessGroup,
) -> None:
    """Measure the last and the best epoch on test, once, and write the best epoch's weights,
    predictions and metrics, and the history. Every rank measures; the main process writes.

    Raises:
        UserError: an input of the stage changed while it ran: nothing is written.
    """
    validation, test = dataset.splits["validation"], dataset.splits["test"]
    last = evaluate(network, spec.input, test, device, group)[1]
    network.load_state_dict(result.best_state)
    validation_logits, best_validation = evaluate(network, spec.input, validation, device, group)
    test_logits, best = evaluate(network, spec.input, test, device, group)
    if not group.is_main:
        return
    inputs.check()
    with atomic_directory(outputs.model) as directory:
        checkpoint.save(directory, network, spec)
        # With it, whatever depends on the models depends on their code: `speed` measures it.
        shutil.copyfile(family_module(spec.family).__file__, directory / "family.py")
    write_predictions(
        outputs.predictions, inputs.params, validation=validation_logits, test=test_logits
    )
    write_history(outputs.history, result.history)
    write_json(
        outputs.metrics,
        {
            **best,
            **{f"last_epoch_{key}": value for key, value in last.items()},
            **best_validation,
            "best_epoch": result.best_epoch,
            **count_parameters_and_macs(network, spec.input),
            "size_bytes": (outputs.model / WEIGHTS).stat().st_size,
        },
    )
    print(
        f"  test accuracy {best['test_accuracy']:.4f} (epoch {result.best_epoch}), "
        f"{last['test_accuracy']:.4f} (last epoch)",
        flush=True,
    )


def write_history(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_bytes(path, text.getvalue().encode())
