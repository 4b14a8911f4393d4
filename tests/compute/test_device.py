"""float32 is float32 on every device that the pipeline computes on; what fits into a device."""

import ast

import torch
from import_closure import ROOT

from pipeline.compute.device import fits


def names_a_gpu(node: ast.AST) -> bool:
    """Whether it is `x.cuda()`, `torch.device("cuda")` or `x.to("cuda")`; also with a number."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    texts = [ast.literal_eval(a) for a in node.args[:1] if isinstance(a, ast.Constant)]
    named = any(isinstance(text, str) and text.startswith("cuda") for text in texts)
    return node.func.attr == "cuda" or (node.func.attr in ("device", "to") and named)


def test_only_the_package_that_turns_tf32_off_names_a_gpu():
    naming = {
        path.parent.name
        for path in (ROOT / "pipeline").rglob("*.py")
        if any(map(names_a_gpu, ast.walk(ast.parse(path.read_text("utf-8")))))
    }
    assert naming == {"compute"}


def test_what_is_in_the_memory_of_a_cpu_fits_there_and_nobody_asks_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: 1 / 0)
    assert fits(2**60, torch.device("cpu"), parts=8)
