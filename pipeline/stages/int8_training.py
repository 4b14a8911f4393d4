"""int8_training: prepare the weights of one distilled student for its int8 file.

Reads what `student` reads, models/students/NAME/ and `export` of params.yaml. Trains the student
some epochs more on the cached soft targets, with rounding as in int8, and writes models/int8/NAME/;
the student's own files stay. With `int8_training: none` or `precision: float32` nothing is trained,
and models/int8/NAME/not_trained.json says why.
"""

from pipeline.runtime.command import run_command

import argparse

from pipeline.export.params import ExportParams, load_export
from pipeline.runtime.files import atomic_directory, write_json
from pipeline.runtime.locks import exclusive
from pipeline.runtime.outputs import ModelOutputs
from pipeline.runtime.stage_inputs import StageInputs


def prepare_for_int8(name: str) -> None:
    """Train the student further, or write why it is not. Another run of the same is refused."""
    export, outputs = load_export(name), ModelOutputs("distilled", name)
    inputs = StageInputs("int8_training", name)
    with exclusive(outputs.int8_scratch):
        train_or_say_why_not(outputs, export, inputs)


def train_or_say_why_not(outputs: ModelOutputs, export: ExportParams, inputs: StageInputs) -> None:
    if export.precision == "int8" and export.int8_training is not None:
        # With torch, which takes seconds to load.
        from pipeline.int8_training.training_run import train_for_int8  # noqa: PLC0415

        train_for_int8(outputs.name, export.int8_training, inputs)
        return
    key = "precision: float32" if export.precision != "int8" else "int8_training: none"
    inputs.check()
    with atomic_directory(outputs.int8_model) as directory:
        write_json(directory / "not_trained.json", {"reason": f"export: {key}"})


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.stages.int8_training", description=__doc__)
    parser.add_argument("name", help="a student in params.yaml")
    prepare_for_int8(parser.parse_args().name)


if __name__ == "__main__":
    run_command(main)
