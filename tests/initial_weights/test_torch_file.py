"""Tensors are read from files of torch without running code, and as torch reads them."""

import argparse
import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from pipeline.initial_weights.checkpoint_file import read_checkpoint
from pipeline.initial_weights.state_dict import list_contents, read_all
from pipeline.runtime.errors import UserError

PLANTED = "import pathlib; pathlib.Path('executed').touch()"


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    return read_all({".".join(e.path): e for e in list_contents(read_checkpoint(path)).tensors})


def zip_of(pickled: bytes, **storages: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in storages.items():
            archive.writestr(f"archive/data/{name.removeprefix('s')}", content)
    return file.getvalue()


class Call:
    """Pickled as a call of any function."""

    def __init__(self, function: Callable, *args: object, state: object = None):
        self.value = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple:
        return self.value


class SetsState:
    def __setstate__(self, state: str) -> None:
        exec(state)

    def __reduce__(self) -> tuple:
        return (SetsState, (), PLANTED)


class Odd(dict):
    """A mapping whose items, list and state are set by other opcodes."""

    def __reduce__(self) -> tuple:
        return (Odd, (), {"x": 1}, iter([Call(exec, PLANTED)]), iter([("a", Call(exec, PLANTED))]))


def opcodes(text: str) -> bytes:
    return text.replace("CODE", PLANTED).encode()


HOSTILE = {
    "a call": Call(exec, PLANTED),
    "a call below tensors": {"model": {"x": torch.ones(1), "y": [Call(exec, PLANTED)]}},
    "a call whose result is called": Call(getattr, Call(__import__, "os"), "system"),
    "a method that sets the state": SetsState(),
    "items and elements of a mapping": Odd(),
    "the state of a call": Call(OrderedDict, state={"_metadata": Call(exec, PLANTED)}),
    "a tensor made by a call": Call(torch._utils._rebuild_parameter, Call(exec, PLANTED), 1, None),
    "INST": opcodes("(S'CODE'\nibuiltins\nexec\n."),
    "OBJ": opcodes("(cbuiltins\nexec\nS'CODE'\no."),
    "NEWOBJ": b"\x80\x02" + opcodes("cbuiltins\nexec\n(S'CODE'\nt\x81."),
    "a nested name": b"\x80\x04" + opcodes("cbuiltins\nexec.__call__\n(S'CODE'\ntR."),
    "a call of what a call returned": opcodes("cos\nsystem\n(S'x'\ntR(S'CODE'\ntR."),
    "a state of a class": opcodes("cos\nsystem\n(S'CODE'\ntb."),
    "a registered extension": b"\x80\x02\x82\x01(tR.",
    "an object outside": opcodes("cbuiltins\nexec\nQ."),
    "a persistent id of protocol 0": b"Pstorage\n.",
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("container", ["zip", "sequence"])
def test_nothing_that_a_file_names_is_executed(folder, kind, container):
    content, path = HOSTILE[kind], Path("hostile.pth")
    if container == "sequence":
        body = content if isinstance(content, bytes) else saved(content, legacy=True)
        head = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {}))
        path.write_bytes(head + body if isinstance(content, bytes) else body)
    else:
        path.write_bytes(zip_of(content) if isinstance(content, bytes) else saved(content))
    with suppress(UserError):
        list_contents(read_checkpoint(path))
    assert not Path("executed").exists()


def saved(content: object, *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def ordinary() -> dict[str, torch.Tensor]:
    whole = torch.arange(24.0).reshape(4, 6)
    dtypes = [torch.half, torch.bfloat16, torch.double, torch.int8, torch.uint8, torch.bool]
    dtypes += [torch.int16, torch.int32, torch.int64, torch.cfloat, torch.cdouble]
    return {
        "whole": whole,
        "view": whole[1:3, ::2],
        "transposed": whole.T,
        "expanded": torch.ones(1).expand(3, 2),
        "parameter": nn.Parameter(torch.randn(3)),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        **{str(dtype).replace(".", "_"): whole.to(dtype) for dtype in dtypes},
        "float8": whole.to(torch.float8_e4m3fn),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_are_those_that_torch_reads(folder, legacy):
    state = ordinary()
    if legacy:  # whose storages had no such types
        state = {key: v for key, v in state.items() if key not in ("float8", "uint16")}
    Path("mine.pth").write_bytes(saved(OrderedDict(state), legacy=legacy))
    witness = torch.load("mine.pth", weights_only=True)
    found = tensors_in(Path("mine.pth"))
    assert found.keys() == witness.keys()
    for key, value in witness.items():
        assert found[key].dtype == value.dtype
        assert found[key].shape == value.shape
        assert found[key].reshape(-1).tolist() == value.reshape(-1).tolist()


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])  # torch itself reads no 0
def test_every_protocol_is_read(folder, protocol):
    state = nn.Linear(2, 3).state_dict()
    for legacy in (False, True):
        torch.save(
            {"model": state, "best": np.float64(3), "args": argparse.Namespace(x=1)},
            "mine.pth",
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=not legacy,
        )
        found = tensors_in(Path("mine.pth"))
        assert found.keys() == {"model.weight", "model.bias"}
        assert torch.equal(found["model.weight"], state["weight"])


def test_a_network_that_was_saved_whole_has_the_tensors_of_its_state_dict(folder):
    network = torchvision.models.squeezenet1_1(num_classes=2)
    network.features[0] = nn.Sequential(network.features[0], nn.BatchNorm2d(64))
    for legacy in (False, True):
        Path("mine.pth").write_bytes(saved(network, legacy=legacy))
        found = tensors_in(Path("mine.pth"))
        assert found.keys() == network.state_dict().keys()
        assert all(torch.equal(found[k], v) for k, v in network.state_dict().items())


def test_a_torchscript_archive_has_the_tensors_of_its_state_dict(folder):
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.jit.save(torch.jit.script(network), "mine.pt")
    found = tensors_in(Path("mine.pt"))
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in network.state_dict().items())


def stored(offset: object, shape: object, stride: object) -> bytes:
    """A file of one tensor of these sizes over 16 bytes."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            if isinstance(value, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", 4)
            return None

    file = io.BytesIO()
    args = (Storage(), offset, shape, stride, False, OrderedDict())
    Pickler(file, 2).dump({"x": Call(torch._utils._rebuild_tensor_v2, *args)})
    return zip_of(file.getvalue(), s0=np.arange(4, dtype=np.float32).tobytes())


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (2,), (2**62,)),
        (2**70, (1,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (-1,), (1,)),
        (0, (2,), (1, 1)),
        (0, (2.0,), (1,)),
        (0, 4, 1),
    ],
)
def test_a_tensor_that_leads_out_of_its_storage_is_refused(folder, offset, shape, stride):
    Path("mine.pth").write_bytes(stored(0, (2, 2), (1, 2)))
    assert tensors_in(Path("mine.pth"))["x"].tolist() == [[0, 2], [1, 3]]
    Path("mine.pth").write_bytes(stored(offset, shape, stride))
    with pytest.raises((ValueError, UserError), match="leads out of its|a tensor has a shape"):
        tensors_in(Path("mine.pth"))


def test_a_damaged_byte_of_a_tensor_is_found(folder):
    content = bytearray(saved({"x": torch.full((1000,), 3.0)}))
    content[content.index(torch.full((10,), 3.0).numpy().tobytes())] ^= 1
    Path("mine.pth").write_bytes(content)
    with pytest.raises(ValueError, match="Bad CRC-32"):
        tensors_in(Path("mine.pth"))


def test_a_file_cut_short_is_refused(folder):
    messages = {False: "is cut short", True: "is not a checkpoint that can be read"}
    for legacy, message in messages.items():
        Path("mine.pth").write_bytes(saved({"x": torch.ones(1000)}, legacy=legacy)[:-500])
        with pytest.raises(UserError, match=message):
            read_checkpoint(Path("mine.pth"))


@pytest.mark.parametrize("kind", ["sparse tensor", "quantized tensor", "tensor without contents"])
def test_tensors_without_a_plain_storage_are_named(folder, kind):
    value = {
        "sparse tensor": torch.eye(3).to_sparse(),
        "quantized tensor": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "tensor without contents": torch.ones(2, device="meta"),
    }[kind]
    torch.save({"x": value}, "mine.pth")
    (entry,) = list_contents(read_checkpoint(Path("mine.pth"))).entries
    assert (entry.path, entry.value) == (("x",), f"a {kind}")
