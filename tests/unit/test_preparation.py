"""What is done to a model for the time that it is trained.

Liger's kernels are Triton programs, which need a GPU: `liger_kernel` is a double here, with the names and arguments
of its version 0.8.5, and so is the model that says it is on a GPU.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from slmops.training import preparation


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, bool]]]:
    """Which models Liger was applied to, and how."""
    calls: list[tuple[Any, dict[str, bool]]] = []
    contents: dict[str, dict[str, Any]] = {
        "liger_kernel": {"__path__": []},
        "liger_kernel.transformers": {
            "__path__": [],
            "_apply_liger_kernel_to_instance": lambda model, **kwargs: calls.append((model, kwargs)),
        },
        "liger_kernel.transformers.monkey_patch": {"MODEL_TYPE_TO_APPLY_LIGER_FN": {"llama": None}},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def model(device: str, model_type: str) -> Any:
    return SimpleNamespace(device=SimpleNamespace(type=device), config=SimpleNamespace(model_type=model_type))


def test_layers_run_on_ligers_kernels_on_a_gpu_and_losses_stay_our_own(applied: list[Any]) -> None:
    llama = model("cuda", "llama")
    preparation._use_liger(llama)
    assert applied == [(llama, {"cross_entropy": False, "fused_linear_cross_entropy": False})]


@pytest.mark.parametrize(("device", "model_type"), [("cpu", "llama"), ("cuda", "an_architecture_without_kernels")])
def test_elsewhere_layers_stay_as_they_are(applied: list[Any], device: str, model_type: str) -> None:
    preparation._use_liger(model(device, model_type))
    assert applied == []


def test_a_gpu_without_liger_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    preparation._use_liger(model("cuda", "llama"))
