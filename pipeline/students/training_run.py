"""What surrounds the loop of a student or a baseline: its network, its saved state, its outputs."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.compute.distributed import ProcessGroup
from pipeline.models import checkpoint
from pipeline.models.checkpoint import WEIGHTS
from pipeline.models.evaluation import count_parameters_and_macs, write_predictions
from pipeline.models.spec import ModelSpec, family_module
from pipeline.runtime.files import atomic_directory, write_json
from pipeline.runtime.locks import exclusive
from pipeline.runtime.outputs import SEEDS, ModelOutputs, NetworkCosts, Start
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.students.initial_network import InitialNetwork, build_initial_network
from pipeline.students.loop import Loss, TrainingData, TrainingResult, evaluate, fit
from pipeline.students.params import StudentParams, TrainingParams, TrainingSection
from pipeline.training.history import write_history
from pipeline.training.resume import ResumeState, fingerprint


@dataclass(frozen=True)
class Trained:
    """A finished training, with the kept epoch's weights."""

    seed: int
    network: nn.Module
    spec: ModelSpec
    start: Start
    result: TrainingResult
    metrics: Mapping[str, Any]  # of the kept and the last epoch
    logits: Mapping[str, Tensor]  # by held-out split

    @property
    def quality(self) -> tuple[float, float]:
        """The sort key on validation: accuracy, then the negative NLL; larger is better."""
        return self.metrics["validation_accuracy"], -self.metrics["validation_nll"]


@dataclass(frozen=True)
class StudentStage:
    """A stage that trains one student or its baseline, once for each seed."""

    outputs: ModelOutputs
    student: StudentParams
    training: TrainingSection
    data: Callable[[int], TrainingData]  # by seed
    loss: Loss
    defining: Mapping[str, Any]  # the training beside `student`, `training` and dataset, as JSON
    inputs: StageInputs
    device: torch.device
    group: ProcessGroup

    def run(self, seed: int | None = None) -> None:
        """Train, and write the outputs. Finished trainings and the state of an unfinished one are
        kept in .scratch: a run with equal inputs resumes from them, and another seed trains alone.

        Args:
            seed: train with it alone, and write nothing but the finished training.

        Raises:
            UserError: the network cannot be built, another run trains this model now, the loss is
                no longer finite, or an input of the stage changed while it ran.
        """
        trainings = self.training.trainings
        if seed is not None:
            self._train(next(params for params in trainings if params.seed == seed), None)
            return
        with self._lock(self.outputs.scratch):
            trained = [self._train(params, self.outputs.history) for params in trainings]
            if self.group.is_main:
                self.inputs.check()
                write_trained(self.outputs, trained, self.inputs)

    def _lock(self, folder: Path) -> AbstractContextManager[None]:
        return exclusive(folder) if self.group.is_main else nullcontext()

    def _train(self, params: TrainingParams, history: Path | None) -> Trained:
        scratch, data = self.outputs.scratch, self.data(params.seed)
        with self.group.main_process_first():  # equal weights on every rank
            name = str(self.outputs.name)
            initial = build_initial_network(name, self.student, params, data.dataset)
        if self.group.is_main:
            self._introduce(params.seed, initial, data)
        fields = {
            "network": asdict(initial.spec),
            "training": params.model_dump(exclude={"seed"}),
            "dataset": data.dataset.fingerprint,
            **self.defining,
        }
        inputs = fingerprint(fields, self.device, self.group)
        with self._lock(scratch / str(params.seed)), self.group.report_peer_failure():
            start = initial.start.sha256
            resume = ResumeState(scratch, inputs, self.group, params.seed, start)
            return self._finished(params, data, initial, resume, history)

    def _introduce(self, seed: int, initial: InitialNetwork, data: TrainingData) -> None:
        stage, student, seeds = self.outputs.stage, self.student, self.training.seeds
        described = [stage.replace("@", " ") + f": {student.family}", student.network.name]
        described.append(initial.start.text)
        if len(seeds) > 1:
            described.append(f"seed {seed} ({seeds.index(seed) + 1} of {len(seeds)})")
        print(", ".join(described), *initial.remarks, sep="\n  ", flush=True)
        if (passes := data.epoch_length / len(data.samples)) > 1:
            print(
                f"  an epoch shows each of {len(data.samples):,} labelled images {passes:.3g} "
                "times: as many steps as its student's",
                flush=True,
            )

    def _finished(
        self,
        params: TrainingParams,
        data: TrainingData,
        initial: InitialNetwork,
        resume: ResumeState,
        history: Path | None,
    ) -> Trained:
        """Train, and measure the last and the kept epoch on test, once. Every rank measures."""
        network, spec = initial.network.to(self.device), initial.spec
        device, group, splits = self.device, self.group, data.dataset.splits
        result = fit(
            network,
            spec.input,
            data,
            self.loss,
            params,
            device,
            group,
            resume=resume,
            head=initial.head,
            history_file=history if group.is_main else None,
        )
        if (last := resume.last_metrics) is None:
            last = evaluate(network, spec.input, splits["test"], device, group)[1]
            if group.is_main:
                self.inputs.check()
            resume.finish({"trained": vars(result)}, last)
        network.load_state_dict(result.kept_state)
        validation, of_validation = evaluate(
            network, spec.input, splits["validation"], device, group
        )
        test, of_test = evaluate(network, spec.input, splits["test"], device, group)
        if group.is_main:
            print(
                f"  test accuracy {of_test['test_accuracy']:.4f} (epoch {result.kept_epoch}), "
                f"{last['test_accuracy']:.4f} (last epoch)",
                flush=True,
            )
        metrics = {
            **of_test,
            **{f"last_epoch_{key}": value for key, value in last.items()},
            **of_validation,
            "kept_epoch": result.kept_epoch,
            "optimiser_steps": result.optimiser_steps,
        }
        logits = {"validation": validation, "test": test}
        return Trained(params.seed, network, spec, initial.start, result, metrics, logits)


def write_trained(outputs: ModelOutputs, trained: Sequence[Trained], inputs: StageInputs) -> None:
    """Write the networks, predictions and metrics of every seed, and the history of the main one:
    the best on validation, by accuracy, then by NLL; the first of equals."""
    main = max(trained, key=lambda each: each.quality)
    others = [each for each in trained if each is not main]
    with atomic_directory(outputs.model) as folder:
        write_network(folder, main.network, main.spec, main.start)
        for each in others:
            write_network(folder / SEEDS / str(each.seed), each.network, each.spec, each.start)
    logits = dict(main.logits)
    for each in others:
        key = ModelOutputs(outputs.role, outputs.name, each.seed).logits_key
        logits |= {f"{key}{split}": of_split for split, of_split in each.logits.items()}
    write_predictions(outputs.predictions, inputs.params, **logits)
    write_history(outputs.history, main.result.history, main.result.kept_epoch)
    costs = NetworkCosts(
        **count_parameters_and_macs(main.network, main.spec.input),
        size_bytes=(outputs.model / WEIGHTS).stat().st_size,
    )
    write_json(outputs.metrics, {**seed_metrics(main, trained), **costs.model_dump()})


def seed_metrics(main: Trained, trained: Sequence[Trained]) -> dict[str, Any]:
    """The metrics of one training; of several, each metric's mean, the standard deviation of
    accuracies and, in a list, which `dvc metrics` leaves out, every training's."""
    if len(trained) == 1:
        return dict(main.metrics)
    counts = {key: main.metrics[key] for key in ("kept_epoch", "optimiser_steps")}
    figures: dict[str, Any] = {"seed": main.seed}
    for key in main.metrics:
        if key not in counts:
            values = [each.metrics[key] for each in trained]
            figures[key] = float(np.mean(values))
            if key in ("test_accuracy", "validation_accuracy"):
                figures[f"{key}_deviation"] = float(np.std(values, ddof=1))
    per_seed = [{"seed": each.seed, **each.metrics} for each in trained]
    return {**figures, **counts, SEEDS: per_seed}


def write_network(
    folder: Path, network: nn.Module, spec: ModelSpec, start: Start | None = None
) -> None:
    """Write a trained network: its description, its weights, its family's code."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder, network, spec, start)
    # With it, whatever depends on the models depends on their code: `speed` measures it.
    shutil.copyfile(family_module(spec.family).__file__, folder / "family.py")
