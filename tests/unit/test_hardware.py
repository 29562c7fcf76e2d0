"""What slmops asks of the hardware, seen in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slmops.hardware import pick_dtype

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

ALLOCATE = """
import re
from pathlib import Path
from slmops import hardware
hardware.use_huge_pages()
import torch
tensor = torch.ones(64 << 20, dtype=torch.uint8)
print(re.search(r"AnonHugePages: +(\\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1])
"""


def huge_kilobytes(**environment: str) -> int:
    """Memory in huge pages of a process that has made a tensor of 64 MB."""
    command = [sys.executable, "-c", ALLOCATE]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    return int(run.stdout)


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(),
    reason="this kernel gives huge pages to everybody or to nobody, so asking for them makes no difference",
)
def test_tensors_of_a_training_step_lie_in_huge_pages_unless_the_environment_says_otherwise() -> None:
    assert huge_kilobytes() > huge_kilobytes(THP_MEM_ALLOC_ENABLE="0") + (32 << 10)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": False, "avx2": True}, torch.float32),
        ({"sve": True}, torch.float32),
    ],
)
def test_auto_takes_bfloat16_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert pick_dtype("auto", torch.device("cpu")) == expected
    assert pick_dtype("float32", torch.device("cpu")) == torch.float32
