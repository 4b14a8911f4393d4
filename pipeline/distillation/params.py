"""`distillation`: one model of parameters per method.

Each method has the parameters and defaults of its authors (docs/losses.md) and refuses all others.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from pipeline.runtime.errors import UserError, did_you_mean
from pipeline.runtime.params import PARAMS_FILE, Section, load_with_overrides, read_params
from pipeline.runtime.validation import shown

Weight = Annotated[float, Field(ge=0)]
Temperature = Annotated[float, Field(gt=0)]


class TemperatureSchedule(Section):
    """T over the epochs of a training, half a cosine: as a rule from soft to sharp targets."""

    first: Temperature  # of the first epoch
    last: Temperature  # of the last epoch, and of all after it

    def at(self, epoch: int, epochs: int) -> float:
        """T of an epoch, counted from 1, of a training of so many (docs/losses.md)."""
        share = min((epoch - 1) / max(epochs - 1, 1), 1.0)
        return self.last + (self.first - self.last) * (1 + math.cos(math.pi * share)) / 2


def _number_or_ends(value: Any) -> Any:
    known = isinstance(value, float | int | TemperatureSchedule)
    if not known and not (isinstance(value, Mapping) and set(value) == {"first", "last"}):
        raise ValueError(f"it is {shown(value)}; expected a number, or `{{first: 8.0, last: 1.0}}`")
    return value


def _kind_of_temperature(value: Any) -> str:
    return "number" if isinstance(value, float | int) else "schedule"


#: One for all epochs, or one for each.
TemperatureOrSchedule = Annotated[
    Annotated[Temperature, Tag("number")] | Annotated[TemperatureSchedule, Tag("schedule")],
    Discriminator(_kind_of_temperature),
    BeforeValidator(_number_or_ends),
]


class DistillationParams(Section):
    """The keys of every method; `students.NAME.distillation` overrides the section key by key."""

    needs_labels: ClassVar[bool] = False  # exactly one for every training image
    needs_every_logit: ClassVar[str] = ""  # the reason, if `top_k` is not enough
    joins_views: ClassVar[bool] = False  # of a pair: `losses.paired_METHOD` is of both at once
    needs_pairs: ClassVar[bool] = False  # of views: it has no loss of one view
    # Of the method's terms: if all of a group are 0, the teacher teaches nothing.
    term_weights: ClassVar[Sequence[Sequence[str]]] = (("soft_label_weight",),)

    method: str
    hard_label_weight: Weight  # of cross-entropy to the labels
    # Of pairs of views: the student sees both, and each view's row teaches that view; or it sees
    # the strong view alone, and the row of the weak one teaches it.
    paired_views: Literal["both", "weak_to_strong"] = "both"

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> "DistillationParams":
        for group in self.term_weights:
            weights = (*group, "hard_label_weight")
            if not any(getattr(self, weight) for weight in weights):
                raise ValueError(f"{', '.join(weights)} are all 0: nothing is left to learn from")
        return self

    @property
    def decoding_temperature(self) -> float:
        """The temperature of the softmax for which rows of `top_k` are decoded. Of a schedule:
        only `at_epoch` has one."""
        return getattr(self, "temperature", 1.0)

    def at_epoch(self, epoch: int, epochs: int) -> Self:
        """The parameters with T of an epoch, counted from 1, of a training of so many."""
        temperature = getattr(self, "temperature", None)
        if not isinstance(temperature, TemperatureSchedule):
            return self
        return self.model_copy(update={"temperature": temperature.at(epoch, epochs)})


class Standardizable(Section):
    """Methods that Sun et al. 2024 define on standardised logits (`rld`: its authors do)."""

    standardized_defaults: ClassVar[Mapping[str, Any]] = {}  # the authors' defaults, if they differ

    standardize: bool = False  # each row of logits: minus its mean, over its standard deviation

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_standardized_logits(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("standardize") is True:
            return {**cls.standardized_defaults, **content}
        return content


class Sortable(Section):
    """Methods whose teacher Limantoro 2025 corrects (`losses.sorted_by_label`)."""

    sort_teacher: bool = False  # the label's class first, the others as the teacher ranks them


class KD(Standardizable, Sortable, DistillationParams):
    standardized_defaults: ClassVar = {"temperature": 2.0, "soft_label_weight": 9.0}

    method: Literal["kd"] = "kd"
    temperature: TemperatureOrSchedule = 4.0
    soft_label_weight: Weight = 0.9
    hard_label_weight: Weight = 0.1
    tail: Literal["spread", "bucket"] = "spread"  # of the classes whose logits `top_k` dropped


class SoftCrossEntropy(DistillationParams):
    method: Literal["soft_cross_entropy"]
    temperature: TemperatureOrSchedule = 1.0
    soft_label_weight: Weight = 1.0
    hard_label_weight: Weight = 0.0
    tail: Literal["spread", "bucket"] = "spread"


class LogitMSE(DistillationParams):
    needs_every_logit = "it compares every logit with the teacher's"

    method: Literal["logit_mse"]
    soft_label_weight: Weight = 1.0
    hard_label_weight: Weight = 0.0


class DKD(Standardizable, Sortable, DistillationParams):
    needs_labels = True
    term_weights = (("alpha", "beta"),)
    standardized_defaults: ClassVar = {"temperature": 2.0, "alpha": 9.0, "beta": 72.0}

    method: Literal["dkd"]
    alpha: Weight = 1.0  # of the target class's term
    beta: Weight = 8.0  # of the other classes' term
    temperature: TemperatureOrSchedule = 4.0
    warmup_epochs: int = Field(default=20, ge=0)  # of linear increase of both terms' weight
    hard_label_weight: Weight = 1.0


class NKD(DistillationParams):
    needs_labels = True
    term_weights = ()

    method: Literal["nkd"]
    gamma: Weight = 1.5  # of the other classes' term
    temperature: TemperatureOrSchedule = 1.0
    hard_label_weight: Weight = 1.0


class DIST(DistillationParams):
    needs_every_logit = (
        "it correlates each class over the batch, and most logits of a rarely kept class are "
        "estimates"
    )
    term_weights = (("soft_label_weight",), ("beta", "gamma"))

    method: Literal["dist"]
    beta: Weight = 1.0  # of the correlation between classes
    gamma: Weight = 1.0  # of the correlation between samples
    temperature: TemperatureOrSchedule = 1.0
    soft_label_weight: Weight = 2.0
    hard_label_weight: Weight = 1.0


class TTM(DistillationParams):
    method: Literal["ttm"]
    gamma: float = Field(default=0.1, gt=0)  # exponent of the teacher's probabilities
    soft_label_weight: Weight = 45.0
    hard_label_weight: Weight = 1.0

    @property
    def decoding_temperature(self) -> float:
        return 1 / self.gamma


class WTTM(TTM):
    method: Literal["wttm"]
    gamma: float = Field(default=0.2, gt=0)
    soft_label_weight: Weight = 4.0


class RLD(Standardizable, DistillationParams):
    needs_labels = True
    needs_every_logit = (
        "it leaves out every class that the teacher ranks above the label, and where the label is "
        "not among the k these are not known"
    )
    term_weights = (("alpha", "beta"),)

    method: Literal["rld"]
    alpha: Weight = 1.0  # of the term of the teacher's confidence
    beta: Weight = 8.0  # of the term of the classes ranked below the label
    temperature: TemperatureOrSchedule = 4.0  # of the classes ranked below the label
    alpha_temperature: Temperature = 1.0  # of the teacher's confidence
    warmup_epochs: int = Field(default=20, ge=0)
    hard_label_weight: Weight = 1.0


class MLKD(Standardizable, DistillationParams):
    needs_every_logit = "it multiplies every class's probability with every other's"
    joins_views = True
    standardized_defaults: ClassVar = {
        "temperatures": [2.0, 3.0, 5.0, 2.0, 6.0],
        "soft_label_weight": 9.0,
    }

    method: Literal["mlkd"]
    temperatures: list[Temperature] = Field(default=[4.0, 3.0, 5.0, 2.0, 6.0], min_length=1)
    soft_label_weight: Weight = 0.9
    hard_label_weight: Weight = 0.1
    paired_views: Literal["both"] = "both"


class CRLD(DistillationParams):
    needs_every_logit = (
        "it takes images by the teacher's confidence at T = 1, and rows are decoded for another T"
    )
    joins_views = needs_pairs = True
    term_weights = (("within_view_weight", "cross_view_weight"),)

    method: Literal["crld"]
    temperature: TemperatureOrSchedule = 4.0
    within_view_weight: Weight = 2.0  # of each view's own row
    cross_view_weight: Weight = 0.5  # of the other view's row
    weak_confidence: float = Field(default=0.9, ge=0, le=1)  # of the teacher, for the former
    strong_confidence: float = Field(default=0.2, ge=0, le=1)  # for the latter
    hard_label_weight: Weight = 1.0
    paired_views: Literal["both"] = "both"


class PLD(DistillationParams):
    needs_labels = True
    needs_every_logit = "it ranks every class, and the order of those that were not kept is lost"
    term_weights = ()

    method: Literal["pld"]
    hard_label_weight: Weight = 0.0  # the method has a term of the label


class SLD(DistillationParams):
    needs_labels = True
    needs_every_logit = "it has several temperatures, and rows are decoded for one"

    method: Literal["sld"]
    temperatures: list[Temperature] = Field(default=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], min_length=1)
    student_teaches_after: int = Field(default=150, ge=0)  # epochs; the authors' of 240
    soft_label_weight: Weight = 0.9
    hard_label_weight: Weight = 0.1


_MODELS = (KD, SoftCrossEntropy, LogitMSE, DKD, NKD, DIST, TTM, WTTM, RLD, MLKD, CRLD, PLD, SLD)
METHODS: dict[str, type[DistillationParams]] = {
    get_args(model.model_fields["method"].annotation)[0]: model for model in _MODELS
}


def load_distillation(
    overrides: Mapping[str, Any] | None = None, student: str = ""
) -> DistillationParams:
    """Load the section, overridden key by key by a student's values. A student that names another
    method starts from that method's defaults instead.

    Raises:
        UserError: no such method, or a key that it does not have.
    """
    overrides = dict(overrides or {})
    section = read_params().get("distillation")
    inherited = section.get("method", "kd") if isinstance(section, Mapping) else "kd"
    method = overrides.get("method", inherited)
    if not isinstance(method, str) or method not in METHODS:
        where = f"students.{student}.distillation" if "method" in overrides else "distillation"
        suggestion = did_you_mean(str(method), list(METHODS)) or "."
        raise UserError(
            f"`{PARAMS_FILE}: {where}.method` is {method!r}{suggestion} "
            f"Known: {', '.join(METHODS)}."
        )
    inherit = method == inherited
    return load_with_overrides(METHODS[method], "distillation", overrides, student, inherit=inherit)


def check_method(
    params: DistillationParams,
    student: str,
    *,
    encoding: str,
    mixed: bool,
    paired: bool = False,
    labels: Sequence[int] = (),
    num_classes: int | None = None,
) -> None:
    """Refuse a store, views or labels that the method's formula or parameters cannot use.

    Args:
        mixed: views are mixed images, with two labels.
        paired: views are pairs.
        labels: of the training images; -1 for none.
        num_classes: of the dataset; None: not known.

    Raises:
        UserError: says why, and which methods can.
    """
    problems, unlabelled = [], sum(int(label) < 0 for label in labels)
    able = ", ".join(
        name
        for name, model in METHODS.items()
        if not (
            (encoding == "top_k" and model.needs_every_logit)
            or ((mixed or unlabelled) and model.needs_labels)
            or (not paired and model.needs_pairs)
            or (params.paired_views == "weak_to_strong" and model.joins_views)
        )
    )
    why, sort_teacher = params.needs_every_logit, getattr(params, "sort_teacher", False)
    if getattr(params, "standardize", False):
        why = "`standardize` takes the deviation over all logits"
    if sort_teacher:
        why = "`sort_teacher` moves logits between classes, and `top_k` stores some"
    if isinstance(params, NKD) and params.temperature != 1:
        why = "it takes the label's probability at T = 1, and rows are decoded for another T"
    if encoding == "top_k" and why:
        problems.append(
            f"needs every logit, but `soft_targets.encoding` is top_k: {why}. Set `encoding: "
            f"dense`, or take one of {able}, neither standardised nor sorted."
        )
    if getattr(params, "standardize", False) and num_classes == 2:
        problems.append(
            "has `standardize`, which leaves of two logits their order alone, and so no gradient. "
            "Remove it."
        )
    if not paired and (params.needs_pairs or "paired_views" in params.model_fields_set):
        has, otherwise = f"has `paired_views: {params.paired_views}`", "remove `paired_views`"
        if params.needs_pairs:
            has, otherwise = "needs pairs of views", "take another method"
        problems.append(
            f"{has}, but in params.yaml `views` are no pairs. Give `views.policy` or "
            f"`views.rand_augment` two values, `{{weak: ..., strong: ...}}`, or {otherwise}."
        )
    if params.needs_labels or sort_teacher:
        has = "has `sort_teacher`, which " if sort_teacher else ""
        found = ["`views.mix` gives it two"] if mixed else []
        if unlabelled:
            found.append(f"{unlabelled:,} of {len(labels):,} training images have none")
        problems += [
            f"{has}needs one label for each image, but {reason}. Take one of {able}"
            + (", without `sort_teacher`." if sort_teacher else ".")
            for reason in found
        ]
    if problems:
        where = f"student `{student}`: method `{params.method}`"
        raise UserError("\n".join(f"{where} {problem}" for problem in problems))
