"""Device classes are read strictly, and a machine knows which of their instruction sets it has."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slmops.device_classes import (
    NOT_BUILDABLE,
    cpu_features,
    missing_features,
    parse_device_classes,
    read_device_classes,
    this_architecture,
)
from slmops.errors import ConfigError

FILE = Path("manifests/edge/device-classes.yaml")


def test_the_shipped_classes_are_of_every_kind() -> None:
    classes = read_device_classes(FILE)
    kinds = {(each.architecture, each.execution_provider) for each in classes.values()}
    assert kinds == {("x86_64", "cpu"), ("aarch64", "cpu"), ("x86_64", "cuda"), ("aarch64", "qnn")}
    assert {"AVX2"} in [set(each.instruction_sets) for each in classes.values()]
    assert {"AVX2", "AVX512VNNI"} in [set(each.instruction_sets) for each in classes.values()]
    assert {each.execution_provider for each in classes.values()} - {"cpu", "cuda"} == NOT_BUILDABLE.keys()


def test_the_copy_in_the_wheel_is_the_same() -> None:
    assert read_device_classes(Path("pipelines/device-classes.yaml")) == read_device_classes(FILE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "riscv64"}, "architecture"),
        ({"instruction_sets": []}, "instruction_sets"),
        ({"instruction_sets": ["avx 2; rm"]}, "no feature as Node Feature Discovery"),
        ({"tokens_per_s": 0}, "tokens_per_s"),
        ({"min_accuracy_kept": 3}, "min_accuracy_kept"),
        ({"latency_ms_p95": float("nan")}, "latency_ms_p95"),
        ({"num_cpus": "two"}, "num_cpus"),
        ({"gpu": 1}, "gpu"),
    ],
)
def test_a_wrong_field_is_named_with_its_file_and_class(change: dict[str, object], said: str, tmp_path: Path) -> None:
    declared = yaml.safe_load(FILE.read_text())
    file = tmp_path / "classes.yaml"
    file.write_text(yaml.safe_dump(declared | {"odd": declared["x86-avx2"] | change}))
    with pytest.raises(ConfigError, match=said) as refused:
        read_device_classes(file)
    assert str(refused.value).startswith(f"{file}: odd: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "must hold 1 to 64 device classes"),
        ("", "must hold 1 to 64 device classes"),
        ("A_B: {}\n", "is no name of a class"),
        ("x86: 3\n", "must have fields"),
        ("x86: [\n", "is no YAML"),
        ("x86: {}\narm64: {}\nx86: {}\n", "x86 is there twice"),
        ("x86: {ram_mib: 1024, disk_mib: 2048, ram_mib: 512}\n", "ram_mib is there twice"),
        (f"# {'x' * (1 << 20)}\n", "is larger than the 1,048,576 bytes that are read"),
    ],
)
def test_what_is_no_file_of_classes_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_device_classes(file)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


@given(ANYTHING)
def test_anything_else_is_a_config_error(declared: object) -> None:
    with pytest.raises(ConfigError):
        parse_device_classes(declared, "device_classes")


def test_whole_numbers_may_come_as_floats_as_kfp_sends_them() -> None:
    declared = yaml.safe_load(FILE.read_text())["x86-avx2"]
    sent = {name: float(value) if isinstance(value, int) else value for name, value in declared.items()}
    assert parse_device_classes({"a": sent}, "here") == parse_device_classes({"a": declared}, "here")
    with pytest.raises(ConfigError, match="num_cpus"):
        parse_device_classes({"a": sent | {"num_cpus": 2.5}}, "here")


def test_features_are_compared_in_the_kernels_names(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\nprocessor\t: 1\nflags\t\t: fpu\n")
    features = cpu_features(cpuinfo)
    assert features == {"fpu", "avx2", "avx512_vnni"}
    assert missing_features(["AVX2", "AVX512VNNI"], features) == []
    assert missing_features(["AVX2", "AMXINT8"], features) == ["AMXINT8"]
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp\n")
    assert missing_features(["ASIMDDP", "I8MM"], cpu_features(cpuinfo)) == ["I8MM"]
    assert cpu_features(tmp_path / "nowhere") == frozenset()
    assert this_architecture() in ("x86_64", "aarch64")
