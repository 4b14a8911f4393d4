"""The libraries that run the networks are in the names of states and of scratch shards."""

import sys
from types import SimpleNamespace

import pytest
import torch

from pipeline.compute.distributed import SINGLE_PROCESS
from pipeline.compute.provenance import library_versions
from pipeline.runtime.outputs import STORE
from pipeline.store.format.schema import StoreIdentity
from pipeline.store.reading.index import read_index
from pipeline.store.writing import finished_shards
from pipeline.training import resume

CPU = torch.device("cpu")


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_another_version_of_a_loaded_library_names_another_state_and_other_shards(
    project, monkeypatch, library
):
    identity = StoreIdentity(**read_index(STORE).fields())
    found = set()
    for version in ("1", "2"):
        monkeypatch.setitem(sys.modules, library, SimpleNamespace(__version__=version))
        found.add(finished_shards.folder(identity, 8, CPU))
        found.add(resume.fingerprint({}, CPU, SINGLE_PROCESS).name)
    assert len(found) == 4


def test_onnxruntime_counts_where_it_runs_a_network_and_not_where_an_export_loaded_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(__version__="1"))
    monkeypatch.delitem(sys.modules, "pipeline.networks.onnx", raising=False)
    assert library_versions()["onnxruntime"] is None
    family = SimpleNamespace(onnxruntime=sys.modules["onnxruntime"])
    monkeypatch.setitem(sys.modules, "pipeline.networks.onnx", family)
    assert library_versions()["onnxruntime"] == "1"
