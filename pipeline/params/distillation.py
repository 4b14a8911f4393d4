"""`distillation`: what a student takes from the teacher."""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.params.loading import Section


class DistillationParams(Section):
    """Defaults for every student; `students.NAME.distillation` overrides them key by key."""

    temperature: float = Field(gt=0)
    soft_label_weight: float = Field(ge=0)  # of temperature² · KL(teacher || student)
    hard_label_weight: float = Field(ge=0)  # of cross-entropy to the labels
    tail: Literal["spread", "bucket"] = "spread"  # the classes whose logits `top_k` did not keep

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> "DistillationParams":
        if self.soft_label_weight == 0 and self.hard_label_weight == 0:
            raise ValueError(
                "soft_label_weight and hard_label_weight are both 0: nothing is left to learn from"
            )
        return self
