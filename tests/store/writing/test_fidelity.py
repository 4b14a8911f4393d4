"""What is stored says what the teacher says, up to bounds; less is refused."""

import hashlib

import h5py
import numpy as np
import pytest
import torch
from conftest import bytes_of, change_params, opened, run_stage
from scipy.special import softmax
from stage_process import SCRATCH, passes

from pipeline.commands.store import verify
from pipeline.models import checkpoint
from pipeline.networks import cifar_resnet
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, write_json
from pipeline.runtime.outputs import STORE, TEACHER
from pipeline.store.format.encodings import decode, encode, less_offset
from pipeline.store.writing.fidelity import MAXIMUM_KL, check_fidelity, store_fidelity

INDEX = STORE / "store.json"


def fidelity() -> dict[str, float]:
    return read_json(INDEX, produced_by="-")["fidelity"]


def shift_the_teacher(amount: float) -> None:
    """Change its logits, but not its probabilities."""
    network, description = checkpoint.load(TEACHER.model, produced_by="-")
    with torch.no_grad():
        network.fc.bias += amount
    checkpoint.save(TEACHER.model, network, description)


@pytest.mark.parametrize("encoding", [{"encoding": "dense"}, {"encoding": "top_k", "k": 1}])
@pytest.mark.parametrize("amount", [-20_000, 3000, 1e6])
def test_a_number_that_all_logits_of_a_row_share_costs_nothing(project, encoding, amount):
    change_params("soft_targets", **encoding)
    shift_the_teacher(amount)
    run_stage("soft_targets")
    # The teacher's own float32 rounds logits near a million to 1/16.
    assert fidelity()["agreement"] == 1
    assert fidelity()["kl_tail_as_one"] < 1e-5
    assert "108 of them match the teacher's logits" in verify(STORE, 108, seed=0)


@pytest.mark.parametrize("offset", [-20_000.0, -77.0, 0.0, 33.0, 3000.0, 1e6])
def test_rows_less_their_offset_have_the_probabilities_of_the_logits(offset):
    logits = np.random.default_rng(0).normal(0, 3, (50, 10)).astype(np.float32)
    moved = logits + np.float32(offset)
    stored = less_offset(moved)
    assert (np.abs(stored.max(1)) <= 32).all()
    differences = stored - stored[:, :1], moved - moved[:, :1]
    np.testing.assert_allclose(*differences, rtol=0, atol=1e-5)


def test_rows_whose_largest_is_within_32_keep_their_bits():
    rows = np.array([[-32, -0.0, 32], [-60_000, 0, 31.9], [60_000, 0, -60_000]], np.float32)
    assert less_offset(rows).tobytes() == rows.tobytes()  # float16 holds the last as it is alone


def test_a_large_offset_in_half_precision_fails_the_stage_and_nothing_is_written(project):
    shift_the_teacher(-20_000)
    change_params("soft_targets", precision="bfloat16")
    before = bytes_of(STORE)
    with pytest.raises(
        UserError,
        match=r"do not hold what the teacher in float32 says: .* KL\(teacher \|\| stored\) is "
        r"\d.* expected .* at most 0.01 nats .* In bfloat16 the forward pass loses .* "
        "set `soft_targets.precision: float32`",
    ):
        run_stage("soft_targets")
    assert bytes_of(STORE) == before


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ({"agreement": 0.3194}, r"class is the teacher's in 31.94%"),
        ({"kl_at_temperature_1": 0.5}, "is 0.5 nats at T = 1"),  # of an older dense store
        ({"kl_tail_as_one": 0.5}, "is 0.5 nats at T = 1"),
    ],
)
def test_verify_refuses_a_store_whose_writer_measured_too_little_fidelity(project, measured, said):
    content = read_json(INDEX, produced_by="-")
    if "kl_at_temperature_1" in measured:
        del content["fidelity"]["kl_tail_as_one"]
    content["fidelity"] |= measured
    write_json(INDEX, content)
    with pytest.raises(UserError, match=f"{said}.*expected at least 95%, and at most 0.01 nats"):
        verify(STORE, 0, seed=0)


def test_verify_measures_a_store_whose_writer_did_not(project):
    write_json(INDEX, read_json(INDEX, produced_by="-") | {"fidelity": {}})
    verify(STORE, 0, seed=0)
    shift = torch.tensor([4.0, 0.0, 0.0])
    network, description = checkpoint.load(TEACHER.model, produced_by="-")
    with torch.no_grad():
        network.fc.bias += shift  # another teacher than the store's
    checkpoint.save(TEACHER.model, network, description)
    other = checkpoint.fingerprint(TEACHER.model, produced_by="-")
    write_json(INDEX, read_json(INDEX, produced_by="-") | {"teacher_fingerprint": other})
    for path in STORE.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            file.attrs["teacher_fingerprint"] = np.bytes_(other)
    with pytest.raises(UserError, match="do not hold what the teacher in float32 says"):
        verify(STORE, 0, seed=0)


def test_equal_largest_logits_are_no_disagreement():
    logits = np.zeros((20, 4), np.float32)
    logits[:, 1:3] = 5
    labels = np.full(20, 2)
    for encoding, k in (("dense", None), ("top_k", 1)):
        stored = encode(logits[:, [0, 2, 1, 3]], labels, encoding, k)
        assert store_fidelity(logits, labels, stored)["agreement"] == 1


def test_one_of_a_thousand_classes_passes_the_bound_and_shows_its_loss():
    """The bound counts the tail as one class; the figures of the page do not."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (200, 1000)).astype(np.float32)
    labels = rng.integers(0, 1000, 200)
    stored = encode(less_offset(logits), labels, "top_k", 1)
    measured = store_fidelity(logits, labels, stored)
    assert measured["agreement"] == 1
    assert measured["kl_tail_as_one"] < 1e-6 < MAXIMUM_KL < 1 < measured["kl_at_temperature_1"]
    check_fidelity(measured, "-", "-")
    # By hand: the two kept classes and the sum of the others.
    decoded, kept = decode(stored, labels, 1000, temperature=1.0)
    p, q = (softmax(z.astype(float), 1) for z in (logits, decoded))
    of_kept = (np.where(kept, p, 0) * np.log(p / q)).sum(1)
    p, q = np.where(kept, 0, p).sum(1), np.where(kept, 0, q).sum(1)
    by_hand = (of_kept + p * np.log(p / q)).mean()
    assert measured["kl_tail_as_one"] == pytest.approx(by_hand, rel=1e-2, abs=1e-12)


@pytest.mark.parametrize(("precision", "extra"), [("float32", 0), ("bfloat16", 3 * 36)])
def test_every_image_that_goes_through_the_teacher_is_counted(project, capsys, precision, extra):
    images, build = [], cifar_resnet.build

    def watched(*arguments, **options):
        network = build(*arguments, **options)
        network.register_forward_hook(lambda _, inputs, out: images.append(len(inputs[0])))
        return network

    change_params("soft_targets", precision=precision, batch_size=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar_resnet, "build", watched)
        run_stage("soft_targets")
    made = 3 * 36 + 2 * 12
    assert sum(images) - 1 == made + extra  # one blank image, when the network is built
    printed = capsys.readouterr().out.rpartition("soft targets:")[2]
    assert passes(printed) == made
    assert (f"ahead: {made} teacher passes and {extra} in float32; " in printed) == (extra > 0)
    assert fidelity()["extra_passes"] == extra


def test_a_shard_whose_measurement_is_lost_is_made_again(project):
    run_stage("soft_targets")
    expected = bytes_of(STORE)
    next(SCRATCH.glob("*/train_view00001_*.json")).write_text("{")
    run_stage("soft_targets")
    assert bytes_of(STORE) == expected
    opened()


class Ending(torch.nn.Module):
    def __init__(self, network: torch.nn.Module, last: str):
        super().__init__()
        self.network, self.last = network, last

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.network(images)
        return logits.softmax(1) if self.last == "softmax" else logits.sigmoid()


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        ("softmax", "probabilities, which are not negative and add up to 1"),
        ("sigmoid", "numbers from 0 to 1, as of a sigmoid"),
    ],
)
def test_a_network_that_ends_in_a_softmax_or_sigmoid_is_no_teacher(
    project, monkeypatch, last, kind
):
    network, _ = checkpoint.load(TEACHER.model, produced_by="-")
    torch.save(Ending(network, last).state_dict(), "mine.pt")
    build = cifar_resnet.build
    monkeypatch.setattr(cifar_resnet, "build", lambda *given: Ending(build(*given), last))
    change_params("teacher", weights="checkpoint", checkpoint="mine.pt")
    before = bytes_of(TEACHER.model)
    with pytest.raises(UserError, match=f"returns {kind}.*; expected logits. ") as refusal:
        run_stage("teacher")
    assert bytes_of(TEACHER.model) == before
    message = str(refusal.value)
    assert "Let `resnet8` of pipeline/networks/cifar_resnet.py return the input of its" in message
    assert "One of the rows: [" in message


def test_verify_refuses_a_store_of_probabilities(project):
    """As an older version wrote it."""
    for path in STORE.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            rows = torch.from_numpy(file["logits"][()]).float().softmax(1).half().numpy()
            file["logits"][...] = rows
            file.attrs["logits_sha256"] = np.bytes_(hashlib.sha256(rows.tobytes()).hexdigest())
    with pytest.raises(UserError, match="`data/soft_targets` holds probabilities, which are not"):
        verify(STORE, 0, seed=0)
