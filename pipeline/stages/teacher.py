"""teacher: train the teacher, fine-tune published weights, load a checkpoint, or import logits.

Reads data/prepared/ and `teacher` of params.yaml; writes models/teacher/, metrics/teacher.json,
its history and predictions/teacher.safetensors. The state after each epoch is kept in
.scratch/training/teacher/: a killed run resumes from it. PROCESSES=N in the environment divides
every batch among N processes.
"""

from pipeline.runtime.command import run_command

import argparse
import sys
from contextlib import nullcontext

from torch import nn

from pipeline.compute import distributed
from pipeline.compute.device import default_device
from pipeline.compute.distributed import ProcessGroup
from pipeline.data.prepared.dataset import open_dataset, verify_dataset
from pipeline.initial_weights.head import head_parameters
from pipeline.runtime.locks import exclusive
from pipeline.runtime.outputs import TEACHER
from pipeline.runtime.params import load_section
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.teacher.initial_network import build_initial_network, is_trained, training_inputs
from pipeline.teacher.loop import fit_teacher
from pipeline.teacher.outputs import EVALUATED, import_logits, write_teacher
from pipeline.teacher.params import TeacherParams
from pipeline.training.data_parallel import predict_distributed
from pipeline.training.resume import ResumeState, fingerprint


def make_teacher(group: ProcessGroup) -> None:
    device = default_device()
    with group.main_process_first():
        inputs = StageInputs("teacher")
        params = load_section(TeacherParams, "teacher")
        dataset = open_dataset()
        if group.is_main:  # once is enough
            verify_dataset()
        if params.weights == "logits":
            if group.is_main:
                import_logits(params, dataset, inputs)
            return
        network, spec = build_initial_network(params, dataset)
        if dataset.encoded:  # decoded at the size of the network's input
            dataset = dataset.resized(spec.input.size)
        trains, head = is_trained(params, spec), frozenset()
        if trains and params.training.separates_head:
            head = head_parameters(network, spec)
        network.to(device)
    if group.is_main:
        described = f"teacher: {params.family}, {params.network.name}, weights: {params.weights}"
        print(described, *getattr(network, "remarks", ()), sep="\n  ")
        if params.weights == "pretrained" and trains:
            print("  some classes are not in its pretraining: its last layer is new")
        elif params.weights == "pretrained":
            print("  all classes are in its pretraining: it is used without training")
        sys.stdout.flush()
    history = []
    if trains:
        fields = training_inputs(params, network, spec, dataset)
        resume = ResumeState(TEACHER.scratch, fingerprint(fields, device, group), group)
        with group.report_peer_failure():
            history = fit_teacher(
                network,
                spec.input,
                dataset,
                params.training,
                device,
                group,
                resume=resume,
                head=head,
                history_file=TEACHER.history if group.is_main else None,
            )
            keep_finished(resume, network, history, inputs, group)

    logits = {}
    for name in EVALUATED:
        split = dataset.splits[name]
        logits[name] = predict_distributed(network, spec.input, split, device=device, group=group)
    if group.is_main:
        write_teacher((network, spec), logits, dataset, params, inputs, history)


def keep_finished(
    resume: ResumeState,
    network: nn.Module,
    history: list[dict[str, float]],
    inputs: StageInputs,
    group: ProcessGroup,
) -> None:
    """Keep the trained network in .scratch, so that another gate, or a full cache of DVC when the
    stage has ended, never trains it again."""
    if resume.last_metrics is None:  # else it was
        if group.is_main:
            inputs.check()
        resume.finish({"network": network.state_dict(), "history": history}, history[-1])


def main() -> None:
    argparse.ArgumentParser("python -m pipeline.stages.teacher", description=__doc__).parse_args()
    if distributed.launch("pipeline.stages.teacher"):
        return
    with distributed.process_group() as group:
        lock = exclusive(TEACHER.scratch) if group.is_main else nullcontext()
        with lock:
            make_teacher(group)


if __name__ == "__main__":
    run_command(main)
