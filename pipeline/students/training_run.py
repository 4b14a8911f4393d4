"""What surrounds the loop of a student or a baseline: its network, its saved state, its outputs."""

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
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
from pipeline.models.spec import ModelSpec, family_module
from pipeline.runtime.files import atomic_directory, write_json
from pipeline.runtime.locks import exclusive
from pipeline.runtime.outputs import ModelOutputs, NetworkCosts, Start
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.students.initial_network import InitialNetwork, build_initial_network
from pipeline.students.loop import Loss, TrainingData, TrainingResult, evaluate, fit
from pipeline.students.params import StudentParams, TrainingParams
from pipeline.training.history import write_history
from pipeline.training.resume import ResumeState, fingerprint


def train_and_write(
    outputs: ModelOutputs,
    student: StudentParams,
    params: TrainingParams,
    data: TrainingData,
    loss: Loss,
    defining: Mapping[str, Any],
    inputs: StageInputs,
    device: torch.device,
    group: ProcessGroup,
) -> None:
    """Train the student's network and write its outputs. The training's state is kept until then,
    and a run with equal inputs resumes from it.

    Args:
        defining: what defines the training beside `student`, `params` and the dataset, as JSON.

    Raises:
        UserError: the network cannot be built, another run trains this model now, the loss is no
            longer finite, or an input of the stage changed while it ran.
    """
    with group.main_process_first():  # equal weights on every rank
        initial = build_initial_network(str(outputs.name), student, params, data.dataset)
    network, spec = initial.network.to(device), initial.spec
    if group.is_main:
        stage = outputs.stage.replace("@", " ")
        described = f"{stage}: {student.family}, {student.network.name}, {initial.start.text}"
        print(described, *initial.remarks, sep="\n  ", flush=True)
        if (passes := data.epoch_length / len(data.samples)) > 1:
            print(
                f"  an epoch shows each of {len(data.samples):,} labelled images {passes:.3g} "
                "times: as many steps as its student's",
                flush=True,
            )
    fields = {
        "network": asdict(spec),
        "weights": initial.start.sha256,
        "training": params.model_dump(),
        "dataset": data.dataset.fingerprint,
        **defining,
    }
    lock = exclusive(outputs.scratch) if group.is_main else nullcontext()
    with lock, group.report_peer_failure():
        resume = ResumeState(outputs.scratch, fingerprint(fields, device, group), group)
        history = outputs.history if group.is_main else None
        result = fit(
            network, spec.input, data, loss, params, device, group, resume, initial.head, history
        )
        write_result(outputs, result, initial, data.dataset, inputs, device, group)
        resume.remove()


def write_result(
    outputs: ModelOutputs,
    result: TrainingResult,
    initial: InitialNetwork,
    dataset: Dataset,
    inputs: StageInputs,
    device: torch.device,
    group: ProcessGroup,
) -> None:
    """Measure the last and the kept epoch on test, once, and write the kept epoch's weights,
    predictions and metrics, and the history. Every rank measures; the main process writes. If an
    input of the stage changed while it ran, nothing is written.
    """
    network, spec = initial.network, initial.spec
    validation, test = dataset.splits["validation"], dataset.splits["test"]
    last = evaluate(network, spec.input, test, device, group)[1]
    network.load_state_dict(result.kept_state)
    validation_logits, kept_validation = evaluate(network, spec.input, validation, device, group)
    test_logits, kept = evaluate(network, spec.input, test, device, group)
    if not group.is_main:
        return
    inputs.check()
    write_model(outputs.model, network, spec, initial.start)
    write_predictions(
        outputs.predictions, inputs.params, validation=validation_logits, test=test_logits
    )
    write_history(outputs.history, result.history, result.kept_epoch)
    costs = NetworkCosts(
        **count_parameters_and_macs(network, spec.input),
        size_bytes=(outputs.model / WEIGHTS).stat().st_size,
    )
    write_json(
        outputs.metrics,
        {
            **kept,
            **{f"last_epoch_{key}": value for key, value in last.items()},
            **kept_validation,
            "kept_epoch": result.kept_epoch,
            "optimiser_steps": result.optimiser_steps,
            **costs.model_dump(),
        },
    )
    print(
        f"  test accuracy {kept['test_accuracy']:.4f} (epoch {result.kept_epoch}), "
        f"{last['test_accuracy']:.4f} (last epoch)",
        flush=True,
    )


def write_model(
    folder: Path, network: nn.Module, spec: ModelSpec, start: Start | None = None
) -> None:
    """Write the folder of a trained network: its description, its weights, its family's code."""
    with atomic_directory(folder) as directory:
        checkpoint.save(directory, network, spec, start)
        # With it, whatever depends on the models depends on their code: `speed` measures it.
        shutil.copyfile(family_module(spec.family).__file__, directory / "family.py")
