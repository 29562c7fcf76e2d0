"""A plan becomes a student: contradictions are found in config.json alone, and the same input gives the same one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from slmops import models, torch_models
from slmops.errors import ConfigError, ModelError
from slmops.inference.runtime import open_runtime
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.run import run as quantize
from slmops.shaping.fresh import fresh_student
from slmops.shaping.plan import StudentPlan, check_plan, sizes_of_student
from slmops.shaping.student import shape_student
from slmops.training.batches import Batch, Row, collate
from tests.datasets import commands

CPU = torch.device("cpu")
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "num_hidden_layers": 30,
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "num_hidden_layers": 28,
    "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "num_hidden_layers": 24,
    "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
}  # fmt: skip
GEMMA = SMOLLM2 | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12}
LONG_ROPE = SMOLLM2 | {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0] * 32}}
QUANTIZED = SMOLLM2 | {"quantization_config": {"quant_method": "gptq"}}
FRESH = {"weights": "fresh"}


def load(path: Path) -> PreTrainedModel:
    return torch_models.load_model(path, dtype=torch.float32, device=CPU)


def calibration() -> Iterator[Batch]:
    yield collate([Row(0, list(range(5, 45)), [3]), Row(1, list(range(60, 90)), [3])], 0, CPU)


def never() -> Iterator[Batch]:
    raise AssertionError("nothing is to be measured")


@pytest.mark.parametrize(
    ("config", "plan"),
    [
        (SMOLLM2, {}),
        (SMOLLM2, {"shape": {"num_hidden_layers": 30}}),
        (SMOLLM2, {"shape": {"num_hidden_layers": 2}, "keep_layers": [0, 29]}),
        (SMOLLM2, {"shape": {"num_attention_heads": 6}}),
        (SMOLLM2, {"shape": {"num_key_value_heads": 1}}),
        (SMOLLM2, {"shape": {"hidden_size": 432, "intermediate_size": 1000}}),
        (SMOLLM2, {"shape": {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4}} | FRESH),
        (QWEN3, {"shape": {"hidden_size": 1000}}),
        (QWEN3, {"shape": {"hidden_size": 1000, "num_attention_heads": 14}} | FRESH),
        (QWEN2, {"shape": {"hidden_size": 800}}),
        (GEMMA, {"shape": {"num_hidden_layers": 3, "hidden_size": 576}}),
        (GEMMA, {"shape": {"hidden_size": 288}} | FRESH),
        (LONG_ROPE, {"shape": {"hidden_size": 192, "num_attention_heads": 3}} | FRESH),
        (GPT2, {}),
        (QUANTIZED, {}),
    ],
)
def test_what_goes_together_passes(config: dict[str, Any], plan: dict[str, Any]) -> None:
    check_plan(StudentPlan.create(plan), config)


@pytest.mark.parametrize(
    ("config", "plan", "complaint"),
    [
        (SMOLLM2, {"keep_layers": [0, 30]}, r"rising order, each from 0 to 29, got \[0, 30\]"),
        (SMOLLM2, {"keep_layers": [-1, 3]}, r"each from 0 to 29, got \[-1, 3\]"),
        (SMOLLM2, {"keep_layers": [3, 3]}, r"got \[3, 3\]"),
        (SMOLLM2, {"keep_layers": [0, 3], "shape": {"num_hidden_layers": 3}}, "names 2 layers, but .* is 3"),
        (SMOLLM2, {"keep_layers": [0, 3]} | FRESH, "with fresh ones give num_hidden_layers"),
        (SMOLLM2, {"shape": {"num_hidden_layers": 31}}, "num_hidden_layers is 31, but the model has only 30"),
        (SMOLLM2, {"shape": {"intermediate_size": 2048}}, "intermediate_size is 2048, but the model has only 1536"),
        (SMOLLM2, {"shape": {"hidden_size": 0}}, "hidden_size must be 1 or more, got 0"),
        (SMOLLM2, {"shape": {"num_attention_heads": -3}}, "num_attention_heads must be 1 or more, got -3"),
        (SMOLLM2, {"shape": {"vocab_size": 1000}}, "vocabulary cannot be changed here"),
        (SMOLLM2, {"shape": {"head_dim": 32}}, "head_dim is no size of a student; use num_hidden_layers"),
        (
            SMOLLM2,
            {"shape": {"hidden_size": 500}},
            "multiple of num_attention_heads in LlamaForCausalLM, got 500 and 9",
        ),
        (SMOLLM2, {"shape": {"num_attention_heads": 5}}, "must be 3 times num_key_value_heads.* got 5 and 1"),
        (SMOLLM2, {"shape": {"num_attention_heads": 6, "num_key_value_heads": 3}}, "whole groups, got 6 and 3"),
        (
            SMOLLM2,
            {"shape": {"num_attention_heads": 8, "num_key_value_heads": 3, "hidden_size": 512}} | FRESH,
            "multiple of num_key_value_heads, got 8 and 3",
        ),
        (SMOLLM2, {"shape": {"hidden_size": 99}} | FRESH, "must be even for rotary positions, got 11"),
        (LONG_ROPE, {"shape": {"hidden_size": 288}} | FRESH, "must stay 64, because LlamaForCausalLM"),
    ],
)
def test_contradictions_are_found_in_the_config_alone(
    config: dict[str, Any], plan: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_plan(StudentPlan.create(plan), config)


@pytest.mark.parametrize(
    ("config", "plan", "complaint"),
    [
        (GEMMA, {"shape": {"hidden_size": 288}}, r"Gemma3ForCausalLM \(model_type 'gemma3_text'\) cannot be cut to"),
        (GPT2, {"shape": {"num_hidden_layers": 3}}, "config.json of GPT2LMHeadModel states no num_hidden_layers"),
        (GPT2, {"keep_layers": [0]}, "GPT2LMHeadModel states no num_hidden_layers"),
        (QUANTIZED, {"keep_layers": [0]}, "LlamaForCausalLM holds quantized weights"),
    ],
)
def test_a_model_that_cannot_be_shaped_is_named(config: dict[str, Any], plan: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        check_plan(StudentPlan.create(plan), config)


def test_all_complaints_come_together() -> None:
    plan = StudentPlan(shape={"vocab_size": 9, "hidden_size": 600, "num_hidden_layers": 0}, keep_layers=[0, 40])
    with pytest.raises(ConfigError) as caught:
        check_plan(plan, SMOLLM2)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the student cannot be made:"
    for word in ("vocabulary", "only 576", "1 or more, got 0", "each from 0 to 29", "names 2 layers", "600 and 9"):
        assert sum(word in line for line in lines) == 1, word


def test_heads_and_key_value_heads_keep_their_ratio_where_one_is_given() -> None:
    assert sizes_of_student(StudentPlan(shape={"num_attention_heads": 6}), SMOLLM2)["num_key_value_heads"] == 2
    assert sizes_of_student(StudentPlan(shape={"num_key_value_heads": 1}), SMOLLM2)["num_attention_heads"] == 3
    without = {name: value for name, value in SMOLLM2.items() if name != "num_key_value_heads"}
    assert sizes_of_student(StudentPlan(shape={"num_attention_heads": 3}), without)["num_key_value_heads"] == 3


@pytest.mark.parametrize(
    "plan",
    [
        StudentPlan(),
        StudentPlan(keep_layers=[0, 3]),
        StudentPlan(shape={"num_hidden_layers": 2}),
        StudentPlan(shape={"num_hidden_layers": 2, "hidden_size": 64}, weights="fresh"),
    ],
)
def test_rows_are_not_read_where_nothing_is_measured(plan: StudentPlan, tiny_model: Path) -> None:
    student, _ = shape_student(load(tiny_model), plan, never, 0)
    assert (
        student.config.num_hidden_layers == sizes_of_student(plan, models.read_config(tiny_model))["num_hidden_layers"]
    )


def test_a_plan_that_asks_for_nothing_takes_any_architecture() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2))
    student, facts = shape_student(model, StudentPlan(), never, 0)
    assert student is model
    assert facts["student_weights"] == "kept"


def test_depth_and_width_together_and_the_facts_say_what_stayed(tiny_teacher: Path, tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 2}
    plan = StudentPlan(shape=shape, layer_rule="importance")
    source = load(tiny_teacher)
    source.generation_config.eos_token_id = [1, 2]
    student, facts = shape_student(source, plan, calibration, 0)
    kept: Any = facts["kept_layers"]
    importance: Any = facts["layer_importance"]
    assert len(importance) == 4
    assert min(importance[layer] for layer in kept) >= max(set(importance) - {importance[layer] for layer in kept})
    assert facts["sizes"] == shape | {"num_key_value_heads": 1}
    assert facts["width_importance"] == "activations"
    assert json.loads(json.dumps(facts)) == facts
    torch_models.save_model(student, torch_models.load_tokenizer(tiny_teacher), tmp_path / "student")
    again = load(tmp_path / "student")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(again(input_ids=ids).logits, student(input_ids=ids).logits)
    assert again.generation_config.eos_token_id == [1, 2]


def test_the_same_input_gives_the_same_student(tiny_teacher: Path) -> None:
    plan = StudentPlan(
        shape={"num_hidden_layers": 3, "hidden_size": 96, "intermediate_size": 99}, layer_rule="importance"
    )
    made = [shape_student(load(tiny_teacher), plan, calibration, 0) for _ in range(2)]
    assert made[0][1] == made[1][1]
    ours, theirs = (student.state_dict() for student, _ in made)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_a_chosen_width_beats_an_arbitrary_one(tiny_teacher: Path) -> None:
    """Importance means something: half of the channels, kept by it, change the teacher's answers least."""
    ids = next(calibration()).input_ids[:, :30]
    teacher = load(tiny_teacher)
    with torch.no_grad():
        wanted = teacher(input_ids=ids).logits.log_softmax(-1)
    plan = StudentPlan(shape={"intermediate_size": 128})
    chosen, _ = shape_student(load(tiny_teacher), plan, calibration, 0)
    arbitrary = copy.deepcopy(teacher)
    decoder: Any = arbitrary.base_model
    for layer in decoder.layers:
        layer.mlp.down_proj.weight.data[:, 128:] = 0
    with torch.no_grad():
        distances = [
            torch.nn.functional.kl_div(
                model(input_ids=ids).logits.log_softmax(-1), wanted, log_target=True, reduction="sum"
            ).item()
            for model in (chosen, arbitrary)
        ]
    assert distances[0] < distances[1]


def test_without_rows_width_is_chosen_by_weights_and_layers_are_refused(tiny_model: Path) -> None:
    _, facts = shape_student(load(tiny_model), StudentPlan(shape={"intermediate_size": 128}), None, 0)
    assert facts["width_importance"] == "weights"
    plan = StudentPlan(shape={"num_hidden_layers": 2}, layer_rule="importance")
    with pytest.raises(ConfigError, match="layer_rule=importance needs calibration rows"):
        shape_student(load(tiny_model), plan, None, 0)


def test_a_student_has_the_dtype_and_mode_of_its_model(tiny_model: Path) -> None:
    for plan in (StudentPlan(shape={"hidden_size": 64}), StudentPlan(shape={"hidden_size": 64}, weights="fresh")):
        source = torch_models.cast(load(tiny_model), torch.bfloat16).train()
        student, _ = shape_student(source, plan, None, 0)
        assert {weight.dtype for weight in student.parameters()} == {torch.bfloat16}
        assert student.training


def test_fresh_weights_are_the_seeds_and_leave_other_random_numbers_alone(tiny_model: Path) -> None:
    plan = StudentPlan(weights="fresh", shape={"hidden_size": 64, "num_hidden_layers": 6})
    source = load(tiny_model)
    before = torch.random.get_rng_state()
    students = [shape_student(source, plan, None, seed)[0] for seed in (1, 1, 2)]
    assert torch.equal(before, torch.random.get_rng_state())
    first, again, other = (student.state_dict()["model.embed_tokens.weight"] for student in students)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(source.config.initializer_range, rel=0.05)
    assert tuple(first.shape) == (source.config.vocab_size, 64)
    assert (students[0].config.num_hidden_layers, students[0].config.head_dim) == (6, 16)


@pytest.mark.parametrize(
    ("kind", "settings", "shape", "head_dim"),
    [
        (LlamaConfig, {}, {"hidden_size": 48, "num_attention_heads": 2}, 24),
        (Qwen2Config, {}, {"hidden_size": 48, "num_attention_heads": 2}, 24),
        (Qwen3Config, {"head_dim": 16}, {"hidden_size": 48}, 16),
        (SmolLM3Config, {}, {"num_hidden_layers": 7}, 8),
        (Phi3Config, {}, {"num_attention_heads": 2}, 16),
        (GPT2Config, {}, {}, None),
    ],
)
def test_a_fresh_student_of_each_architecture_runs(
    kind: Any, settings: dict[str, Any], shape: dict[str, int], head_dim: int | None
) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind is not GPT2Config:
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2}
    config = kind(vocab_size=64, pad_token_id=0, **(sizes | settings))
    model_type = type(AutoModelForCausalLM.from_config(config))
    student = fresh_student(model_type, config, StudentPlan(weights="fresh", shape=shape), 0)
    assert student(input_ids=torch.arange(12)[None]).logits.shape == (1, 12, 64)
    assert {name: getattr(student.config, name) for name in shape} == shape
    if head_dim:
        decoder: Any = student.base_model
        assert decoder.layers[0].self_attn.head_dim == head_dim


def test_what_a_config_says_of_each_layer_goes_on_in_a_deeper_fresh_student() -> None:
    config = SmolLM3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=4, no_rope_layers=[1, 0, 1, 1], pad_token_id=0,
    )  # fmt: skip
    kind = type(AutoModelForCausalLM.from_config(config))
    student = fresh_student(kind, config, StudentPlan(weights="fresh", shape={"num_hidden_layers": 6}), 0)
    assert student.config.no_rope_layers == [1, 0, 1, 1, 1, 0]


def test_sizes_that_only_transformers_can_judge_are_explained() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    kind = type(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ModelError, match=r"llama cannot have the sizes .*not a multiple"):
        fresh_student(kind, config, StudentPlan(weights="fresh", shape={"hidden_size": 33}), 0)


def test_a_narrow_student_runs_on_the_edges_runtime_as_in_torch(tiny_teacher: Path, tmp_path: Path) -> None:
    """Its head_dim is no longer hidden_size / num_attention_heads, and all its runtimes have to know."""
    plan = StudentPlan(shape={"hidden_size": 96, "num_attention_heads": 2, "num_hidden_layers": 3})
    student, _ = shape_student(load(tiny_teacher), plan, calibration, 0)
    torch_models.save_model(student, torch_models.load_tokenizer(tiny_teacher), tmp_path / "student")
    quantize(QuantizeConfig(variants=["cpu-int8"]), model=tmp_path / "student", variants=tmp_path / "variants")
    records = commands(8, seed=5)
    in_torch, on_the_edge = (
        open_runtime(path, quantized=quantized, dtype="float32", num_threads=1).answer_losses(records)
        for path, quantized in ((tmp_path / "student", False), (tmp_path / "variants" / "cpu-int8", True))
    )
    assert [loss for loss, _ in on_the_edge] == pytest.approx([loss for loss, _ in in_torch], rel=0.05)
