"""The losses: values by hand, what must not matter, and what must not break them."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_loss import method_loss
from torch import Tensor

from pipeline.distillation import losses
from pipeline.distillation.losses import kd, soft_cross_entropy
from pipeline.distillation.params import METHODS, DistillationParams
from pipeline.store.format.encodings import decode, encode
from pipeline.students.label_loss import label_loss

#: Every method with its authors' defaults, and standardised where it can be.
VARIANTS: dict[str, DistillationParams] = {
    **{name: model(method=name) for name, model in METHODS.items() if not model.needs_pairs},
    **{
        f"{name} standardized": model(method=name, standardize=True)
        for name, model in METHODS.items()
        if "standardize" in model.model_fields
    },
    **{
        f"{name} sorted": model(method=name, sort_teacher=True)
        for name, model in METHODS.items()
        if "sort_teacher" in model.model_fields
    },
}
ROWS = list(VARIANTS.items())
FULL = 1000  # an epoch after every warm-up
few_examples = settings(max_examples=15)  # for each method


def loss_of(params: DistillationParams) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    function = method_loss(params)
    return lambda student, teacher, labels: function(student, teacher, labels, None, FULL)


def random_rows(num_rows: int = 6, num_classes: int = 10, seed: int = 0, scale: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale * torch.randn(num_rows, num_classes, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    return student, teacher, torch.randint(num_classes, (num_rows,), generator=generator)


def hard_rows(num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of ±80, a one-hot teacher, right and wrong; constant rows; a student like its
    teacher. Exact in float32."""
    student, teacher, labels = random_rows(8, num_classes)
    student, teacher = student.float().double(), teacher.float().double()
    teacher[0], teacher[0, labels[0]] = -80, 80
    teacher[1], teacher[1, (labels[1] + 1) % num_classes] = -80, 80
    student[1], student[1, labels[1]] = -80, 80
    student[2] = -teacher[2].sign() * 80
    teacher[3] = 1.7
    student[4] = 0.3
    student[5] = teacher[5] = 80.0
    student[6] = teacher[6]
    return student, teacher, labels


def values_and_gradient(
    loss, student, teacher, labels, *, autocast: bool = False
) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(student, teacher, labels)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


# --- values by hand


def test_kd_is_the_value_computed_by_hand():
    # Teacher [ln 3, 0], student [0, 0], T = 1: p = (3/4, 1/4), q = (1/2, 1/2).
    student = torch.zeros(1, 2).double()
    teacher = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kd(student, teacher, temperature=1.0).item() == pytest.approx(by_hand, rel=1e-12)
    # T = 2 on [2 ln 3, 0] is the same p, times T**2 = 4.
    loss = kd(student, 2 * teacher, temperature=2.0)
    assert loss.item() == pytest.approx(4 * by_hand, rel=1e-12)


def test_soft_cross_entropy_is_kd_and_the_teachers_entropy():
    student, teacher, _ = random_rows()
    entropy = 4.0**2 * torch.special.entr(torch.softmax(teacher / 4.0, 1)).sum(1).mean()
    loss = soft_cross_entropy(student, teacher, temperature=4.0)
    torch.testing.assert_close(loss, kd(student, teacher, temperature=4.0) + entropy)


def test_dkd_with_the_label_classes_own_weights_is_kd():
    # KL = KL(label, others) + (1 - p_label) KL among the others (Zhao et al. 2022, section 3).
    student, teacher, labels = random_rows(1)
    others = 1 - torch.softmax(teacher, 1)[0, labels[0]].item()
    loss = losses.dkd(student, teacher, labels, alpha=1.0, beta=others, temperature=1.0)
    assert loss.item() == pytest.approx(kd(student, teacher, temperature=1.0).item(), rel=1e-12)


def test_rld_takes_no_notice_of_classes_that_the_teacher_ranks_above_the_label():
    student, teacher, labels = random_rows()
    constants = {"alpha": 0.0, "beta": 1.0, "temperature": 2.0, "alpha_temperature": 1.0}
    above = teacher > teacher.gather(1, labels[:, None])
    assert above.any()
    assert not above.all(1).any()
    before = losses.rld(student, teacher, labels, **constants)
    after = losses.rld(torch.where(above, 50.0, student), teacher, labels, **constants)
    assert after.item() == pytest.approx(before.item(), rel=1e-12)


def test_pld_is_the_formula_written_out():
    """arXiv:2506.12542: each rank's class, chosen among those of this rank and below."""
    student, teacher, labels = random_rows(5, 7)
    rows = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        ranking = [y, *sorted({*range(7)} - {y}, key=lambda c: -t[c])]
        total = sum(math.exp(logit) for logit in t)
        rows.append(0.0)
        for rank, chosen in enumerate(ranking):
            left = sum(math.exp(s[other]) for other in ranking[rank:])
            rows[-1] -= math.exp(t[chosen]) / total * math.log(math.exp(s[chosen]) / left)
    loss = losses.pld(student, teacher, labels)
    assert loss.item() == pytest.approx(np.mean(rows), rel=1e-12)


@pytest.mark.parametrize(
    ("params", "epoch", "value", "gradient"),
    [
        ({"method": "sld"}, 150, 22.18922811225571, 2.199590795762826),
        ({"method": "sld"}, 151, 28.319620442361078, 4.203543837300325),
        ({"method": "kd", "sort_teacher": True}, 1, 5.231873608899125, 0.45777978982456125),
        ({"method": "dkd", "sort_teacher": True}, 20, 50.06015041487888, 4.462235764513186),
    ],
)
def test_a_corrected_teacher_gives_the_loss_and_gradient_of_its_authors_code(
    params, epoch, value, gradient
):
    """The figures, in float64 with the authors' default weights. `sld`: half of what
    `SLD.forward_train` of StephenEkaputra/Swapped-Logit-Distillation at f035ede makes of these rows
    as both views. `sort_teacher`: `forward_train` of StephenEkaputra/SortKD at 923e97a."""
    steps = torch.arange(48, dtype=torch.float64).reshape(6, 8)
    student, teacher = 3 * torch.sin(1.7 * steps), 4 * torch.cos(0.9 * steps + 0.3)
    labels = torch.tensor([0, 3, 5, 7, 2, 2])
    params = METHODS[params["method"]](**params)
    method = method_loss(params)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        soft = method(student, teacher, labels, None, epoch)
        return soft + params.hard_label_weight * label_loss(student, labels)

    found, found_gradient = values_and_gradient(loss, student, teacher, labels)
    assert found.item() == pytest.approx(value, rel=1e-12)
    assert found_gradient.norm().item() == pytest.approx(gradient, rel=1e-12)


def test_a_sorted_row_has_its_labels_class_first_and_the_others_in_the_teachers_order():
    row = torch.tensor([[5.0, 1.0, 4.0, 4.0, 2.0]])
    for label, expected in ((0, [5, 1, 4, 4, 2]), (4, [4, 1, 4, 2, 5]), (1, [4, 5, 4, 2, 1])):
        found = losses.sorted_by_label(row, torch.tensor([label]))
        assert found.tolist() == [expected]


def test_wttm_weighs_samples_by_the_power_sum_of_the_teachers_probabilities():
    student, teacher, _ = random_rows(4)
    weights = torch.softmax(teacher, 1).pow(0.2).sum(1)
    rows = [losses.ttm(student[i : i + 1], teacher[i : i + 1], gamma=0.2) for i in range(4)]
    by_hand = sum(w * row for w, row in zip(weights, rows, strict=True)) / 4
    assert losses.wttm(student, teacher, gamma=0.2).item() == pytest.approx(by_hand.item())


def test_standardised_rows_have_mean_0_and_deviation_1_so_scale_and_shift_do_not_matter():
    _, teacher, _ = random_rows()
    rows = losses.standardized(5 + 7 * teacher)
    assert rows.mean(1).numpy() == pytest.approx(np.zeros(6), abs=1e-7)
    assert rows.std(1).numpy() == pytest.approx(np.ones(6), rel=1e-6)
    assert losses.standardized(torch.full((2, 7), 0.1)).abs().max() < 1e-6
    loss = kd(3 * teacher - 4, teacher, temperature=2.0, standardize=True)
    assert loss.item() == pytest.approx(0, abs=1e-7)


# --- what must hold for every method


@pytest.mark.parametrize(("name", "params"), ROWS)
def test_gradients_are_those_of_the_values(name, params):
    student, teacher, labels = random_rows(5, 7)
    assert torch.autograd.gradcheck(
        lambda logits: loss_of(params)(logits, teacher, labels), student.requires_grad_()
    )


@pytest.mark.parametrize(("name", "params"), ROWS)
@few_examples
@given(seed=st.integers(0, 2**31), shift=st.floats(-20, 20))
def test_a_constant_added_to_a_row_changes_no_loss(name, params, seed, shift):
    """A store subtracts one from each row."""
    student, teacher, labels = random_rows(seed=seed)
    loss = loss_of(params)
    shifts = shift * torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    value = loss(student, teacher, labels).item()
    assert loss(student + shifts, teacher, labels).item() == pytest.approx(value, rel=1e-9)
    assert loss(student, teacher + shifts, labels).item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(("name", "params"), ROWS)
@few_examples
@given(seed=st.integers(0, 2**31))
def test_the_order_of_classes_and_of_samples_changes_nothing(name, params, seed):
    student, teacher, labels = random_rows(seed=seed)
    loss = loss_of(params)
    value = loss(student, teacher, labels).item()
    classes, samples = torch.randperm(10), torch.randperm(6)
    renamed = loss(student[:, classes], teacher[:, classes], classes.argsort()[labels])
    assert renamed.item() == pytest.approx(value, rel=1e-9)
    reordered = loss(student[samples], teacher[samples], labels[samples])
    assert reordered.item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("name", ["kd", "kd standardized", "dkd", "dkd standardized", "mlkd"])
@few_examples
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 30))
def test_kl_is_0_at_equality_and_never_negative(name, seed, scale):
    student, teacher, labels = (
        x.float() if x.is_floating_point() else x for x in random_rows(seed=seed, scale=scale)
    )
    loss = loss_of(VARIANTS[name])
    assert loss(teacher, teacher, labels).item() == pytest.approx(0, abs=1e-9)
    assert loss(student, teacher, labels).item() > -1e-5


@pytest.mark.parametrize(("name", "params"), ROWS)
@pytest.mark.parametrize(("num_classes", "autocast"), [(2, False), (1000, True)])
def test_extreme_rows_are_finite_and_those_of_float64(name, params, num_classes, autocast):
    student, teacher, labels = hard_rows(num_classes)
    loss = loss_of(params)
    value, gradient = values_and_gradient(loss, student, teacher, labels)
    value_32, gradient_32 = values_and_gradient(
        loss, student.float(), teacher.float(), labels, autocast=autocast
    )
    assert value_32.dtype == torch.float32
    assert torch.isfinite(value_32)
    assert torch.isfinite(gradient_32).all()
    assert value_32.item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6)
    largest = max(gradient.abs().max().item(), 1e-6)
    assert (gradient_32 - gradient).abs().max().item() <= 2e-5 * largest


@pytest.mark.parametrize(("name", "params"), ROWS)
def test_half_precision_logits_are_computed_in_float32(name, params):
    student, teacher, labels = random_rows()
    student, teacher = student.bfloat16(), teacher.half()
    loss = loss_of(params)(student, teacher, labels)
    assert loss.dtype == torch.float32
    exact = loss_of(params)(student.double(), teacher.double(), labels)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


# --- the weight, and the labels


def test_the_weight_grows_over_the_warm_up_as_its_authors_have_it():
    rows = random_rows()
    for method in ("dkd", "rld"):
        loss = method_loss(METHODS[method](method=method, warmup_epochs=20))
        whole = loss(*rows, None, 1000).item()
        for epoch, share in ((1, 0.05), (10, 0.5), (20, 1.0), (21, 1.0)):
            assert loss(*rows, None, epoch).item() == pytest.approx(share * whole)
    no_warm_up = method_loss(METHODS["dkd"](method="dkd", warmup_epochs=0))
    assert no_warm_up(*rows, None, 1).item() == pytest.approx(no_warm_up(*rows, None, 9).item())


@pytest.mark.parametrize(
    "name", [n for n, params in ROWS if n in METHODS and not params.needs_labels]
)
def test_rows_without_a_label_are_taught_by_the_teacher_alone(name):
    student, teacher, labels = random_rows()
    loss = loss_of(VARIANTS[name])
    unlabelled = values_and_gradient(loss, student, teacher, torch.full((6,), -1))
    labelled = values_and_gradient(loss, student, teacher, labels)
    assert torch.equal(unlabelled[0], labelled[0])
    assert (unlabelled[1].abs().sum(1) > 0).all()
    some = torch.where(torch.arange(6) < 2, -1, labels)
    _, gradient = values_and_gradient(lambda s, _, y: label_loss(s, y), student, None, some)
    assert (gradient[:2] == 0).all()


# --- what a sparse store kept


def test_kd_with_the_tail_in_one_bucket_is_the_value_computed_by_hand():
    # Teacher (1/2, 1/4, 1/8, 1/8), student (1/4, 1/4, 1/3, 1/6); classes 2 and 3 are the tail:
    # p = (1/2, 1/4 | 1/4), q = (1/4, 1/4 | 1/2).
    teacher = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]], dtype=torch.float64).log()
    student = torch.tensor([[1 / 4, 1 / 4, 1 / 3, 1 / 6]], dtype=torch.float64).log()
    kept = torch.tensor([[True, True, False, False]])
    by_hand = 1 / 2 * math.log(2) + 0 + 1 / 4 * math.log(1 / 2)
    loss = kd(student, teacher, temperature=1.0, kept=kept)
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)
    # T = 2 on twice the logits is the same, times T**2 = 4.
    loss = kd(2 * student, 2 * teacher, temperature=2.0, kept=kept)
    assert loss.item() == pytest.approx(4 * by_hand, rel=1e-12)


def test_kd_with_the_tail_spread_is_the_value_computed_by_hand():
    # The same, the teacher's tail of 1/4 spread over classes 2 and 3 as 1/8 each: the bucket's
    # terms, and that of the tail's shares, 1/4 * KL((1/2, 1/2) || (2/3, 1/3)).
    rows = np.log(np.array([[1 / 2, 1 / 4, 3 / 16, 1 / 16]], np.float32))
    labels = np.array([0])
    dense, _ = decode(encode(rows, labels, "top_k", 2), labels, 4, temperature=1.0)
    student = torch.tensor([[1 / 4, 1 / 4, 1 / 3, 1 / 6]], dtype=torch.float64).log()
    loss = kd(student, torch.from_numpy(dense).double(), temperature=1.0)
    bucket = 1 / 2 * math.log(2) + 1 / 4 * math.log(1 / 2)
    shares = 1 / 4 * (1 / 2 * math.log(3 / 4) + 1 / 2 * math.log(3 / 2))
    assert loss.item() == pytest.approx(bucket + shares, abs=2e-3)  # float16 logits


@pytest.mark.parametrize(
    ("method", "tail"), [("kd", "spread"), ("kd", "bucket"), ("soft_cross_entropy", "bucket")]
)
def test_top_k_equals_dense_when_k_is_the_number_of_classes(method, tail):
    temperature, rng = 4.0, np.random.default_rng(0)
    rows, labels = 4 * rng.standard_normal((8, 10)).astype(np.float32), rng.integers(0, 10, 8)
    teacher, kept = decode(encode(rows, labels, "top_k", 10), labels, 10, temperature=temperature)
    student = torch.from_numpy(rng.standard_normal((8, 10)).astype(np.float32))
    loss = method_loss(METHODS[method](method=method, temperature=temperature, tail=tail))
    dense, sparse = (
        loss(student, torch.from_numpy(logits), torch.from_numpy(labels), mask, 1).item()
        for logits, mask in (
            (rows.astype(np.float16).astype(np.float32), None),
            (teacher, torch.from_numpy(kept)),
        )
    )
    assert sparse == pytest.approx(dense, rel=1e-6)
    assert tail == "bucket" or sparse == dense


@pytest.mark.parametrize(
    "params", [params for n, params in ROWS if n in METHODS and not params.needs_every_logit]
)
def test_methods_that_take_top_k_come_close_to_dense(params):
    """A peaked teacher of 100 classes, k = 30: within 15 % of the dense loss."""
    rng = np.random.default_rng(0)
    rows, labels = 3 * rng.standard_normal((64, 100)).astype(np.float32), rng.integers(0, 100, 64)
    arrays = encode(rows, labels, "top_k", 30)
    sparse, _ = decode(arrays, labels, 100, temperature=params.decoding_temperature)
    student, targets = torch.from_numpy(3 * rng.standard_normal(rows.shape)), torch.tensor(labels)
    dense, approximate = (
        loss_of(params)(student, torch.from_numpy(teacher).double(), targets).item()
        for teacher in (rows, sparse)
    )
    assert approximate == pytest.approx(dense, rel=0.15)


def test_gradients_of_the_bucket_are_those_of_its_values():
    student, teacher, _ = random_rows()
    kept = torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) < 0.4
    kept[0], kept[1] = True, False
    assert torch.autograd.gradcheck(
        lambda logits: kd(logits, teacher, temperature=4.0, kept=kept), student.requires_grad_()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("loss", [kd, soft_cross_entropy])
def test_the_bucket_is_finite_for_extreme_logits_and_for_rows_without_a_tail(loss, dtype):
    student = torch.tensor([[80, -80, 0, 0], [-80, 80, 0, 0], [0, 0, 80, -80.0]], dtype=dtype)
    kept = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 1]]).bool()
    student.requires_grad_()
    value = loss(student, -student.detach(), temperature=1.0, kept=kept)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()
