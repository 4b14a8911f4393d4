"""CUDA graphs without a GPU: operations on the CPU are recorded while a graph is captured, and a
replay runs them again on the same memory. It stands for `torch.cuda.CUDAGraph` alone: what a GPU
refuses to capture, this records.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph:
    def __init__(self):
        self.recorded: list[tuple[Any, tuple, dict, list]] = []

    @torch.no_grad()
    def replay(self) -> None:
        for operation, arguments, options, outputs in self.recorded:
            again = tree_leaves(operation(*arguments, **options))
            for output, value in zip(outputs, again, strict=True):
                # A view and an operation in place have written to the same memory already.
                if isinstance(output, torch.Tensor) and output.data_ptr() != value.data_ptr():
                    output.copy_(value)


class Recording(TorchDispatchMode):
    def __init__(self, graph: Graph, **_: object):
        super().__init__()
        self._recorded = graph.recorded

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        outputs = operation(*arguments, **(options or {}))
        self._recorded.append((operation, arguments, options or {}, tree_leaves(outputs)))
        return outputs


def record_graphs(patch: pytest.MonkeyPatch) -> None:
    """Let `torch.cuda.make_graphed_callables` capture on the CPU."""
    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "graph", Recording)
    patch.setattr(torch.cuda, "synchronize", lambda: None)
    patch.setattr(torch.cuda, "Stream", lambda: None)
    patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    patch.setattr("torch.cuda.graphs.graph_pool_handle", lambda: None)
