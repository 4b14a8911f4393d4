"""The libraries that run the networks are in the names of states and of scratch shards."""

import sys
from types import SimpleNamespace

import pytest
import torch

from pipeline.compute.distributed import SINGLE_PROCESS
from pipeline.runtime.outputs import STORE
from pipeline.store.format.schema import StoreIdentity
from pipeline.store.reading.index import read_index
from pipeline.store.writing import finished_shards
from pipeline.training import resume

CPU = torch.device("cpu")


@pytest.mark.parametrize("library", ["timm", "torchvision", "onnxruntime"])
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
