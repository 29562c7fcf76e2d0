"""Who may import whom."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

from slmops.kubeflow.components import component_folders
from slmops.kubeflow.generate import checkout

HEAVY = ("torch", "transformers", "onnxruntime", "onnxruntime_genai", "olive", "pyarrow", "boto3")


def test_the_contracts_of_pyproject_are_kept() -> None:
    assert lint_imports(config_filename=str(checkout() / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS


def test_no_step_imports_another_step() -> None:
    graph = grimp.build_graph("slmops", cache_dir=None)
    steps = [f"slmops.{folder.step}" for folder in component_folders()]
    for step in steps:
        for module in {step} | graph.find_descendants(step):
            for imported in graph.find_modules_directly_imported_by(module):
                others = [o for o in steps if o != step and (imported == o or imported.startswith(f"{o}."))]
                assert not others, f"{module} imports {imported}: put what they share beside the steps"


def test_compiling_a_pipeline_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from slmops.kubeflow.compile import prepare;"
        f"prepare('distill_to_edge', None, [], Path({str(tmp_path / 'p.yaml')!r}));"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_help_of_the_command_imports_neither_kfp_nor_torch() -> None:
    code = "import sys, slmops.cli; print([n for n in ('kfp', 'torch', 'boto3', 'yaml') if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
