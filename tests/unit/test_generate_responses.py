"""generate_responses: answers do not depend on the batch, sampling repeats, finished batches are not asked again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from slmops import torch_models
from slmops.cached_logits import DESCRIPTION, RECORDS, ROW_STARTS, open_cached_logits
from slmops.errors import ArtifactError, DataError
from slmops.generate_responses import run as step
from slmops.generate_responses.config import GenerateResponsesConfig
from slmops.merge_responses.config import MergeResponsesConfig
from slmops.merge_responses.run import run as merge
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.run import run as quantize
from slmops.records import ROWS, read_records
from slmops.teachers.cache import AnswerCache
from slmops.teachers.interface import Answer
from slmops.training.batches import encode_rows


def quick(**settings: object) -> GenerateResponsesConfig:
    return GenerateResponsesConfig.create({"max_new_tokens": 16, "max_rows": 24, "dtype": "float32"} | settings)


def test_batched_answers_are_those_of_each_prompt_alone(tiny_teacher: Path, train_rows: Path, tmp_path: Path) -> None:
    step.run(quick(batch_size=8), prompts=train_rows, teacher=tiny_teacher, responses=tmp_path / "batched")
    step.run(quick(batch_size=1), prompts=train_rows, teacher=tiny_teacher, responses=tmp_path / "alone")
    batched, alone = read_records(tmp_path / "batched"), read_records(tmp_path / "alone")
    assert batched == alone
    assert [row.prompt for row in batched] == [row.prompt for row in read_records(train_rows)[:24]]


def test_kept_logits_are_the_teachers_own(tiny_teacher: Path, tiny_responses: Path) -> None:
    records = read_records(tiny_responses)
    cached = open_cached_logits(tiny_responses, len(records))
    model = torch_models.load_model(tiny_teacher, dtype=torch.float32, device=torch.device("cpu"))
    for row in encode_rows(torch_models.load_tokenizer(tiny_teacher), records, 512, last_turn_only=True)[:5]:
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids])).logits[0]
        expected, ids = torch.log_softmax(logits[[at - 1 for at in row.targets]] / 2.0, -1).topk(8, -1)
        kept = slice(cached.row_starts[row.index], cached.row_starts[row.index + 1])
        np.testing.assert_allclose(cached.top_log_probs[kept], expected.numpy(), rtol=2e-3, atol=2e-3)
        assert (cached.top_ids[kept][:, 0] == ids[:, 0].numpy()).all()


def test_sampling_repeats_with_its_seed(tiny_teacher: Path, train_rows: Path, tmp_path: Path) -> None:
    answers = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = quick(decoding="sample", temperature=1.5, seed=seed)
        step.run(config, prompts=train_rows, teacher=tiny_teacher, responses=tmp_path / name)
        answers.append([row.completion for row in read_records(tmp_path / name)])
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_answers_survive_a_stop(
    tiny_teacher: Path, train_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is stopped after nine answers; the second run asks for the others only."""
    put, num_put = AnswerCache.put, 0

    def counted(cache: AnswerCache, key: str, answer: Answer) -> None:
        nonlocal num_put
        num_put += 1
        if num_put == 10:
            raise KeyboardInterrupt
        put(cache, key, answer)

    monkeypatch.setattr(AnswerCache, "put", counted)
    inputs = {"prompts": train_rows, "teacher": tiny_teacher, "responses": tmp_path / "responses"}
    with pytest.raises(KeyboardInterrupt):
        step.run(quick(batch_size=8, logits_top_k=4), **inputs)
    assert not (tmp_path / "responses").exists()
    facts = step.run(quick(batch_size=3, logits_top_k=4), **inputs).facts
    assert (facts["num_asked"], facts["num_prompts"]) == (24 - 9, 24)
    assert open_cached_logits(tmp_path / "responses", facts["num_rows"]).info.k == 4


def test_a_quantized_variant_is_a_teacher(tiny_teacher: Path, train_rows: Path, tmp_path: Path) -> None:
    """Most of its answers are those of the model that it was made of."""
    quantize(QuantizeConfig(), model=tiny_teacher, variants=tmp_path / "variants")
    inputs = {"prompts": train_rows, "responses": tmp_path / "responses"}
    config = quick(teacher_kind="genai", logits_top_k=4)
    sidecar = step.run(config, teacher=tmp_path / "variants" / "cpu-int4", **inputs)
    assert sidecar.facts["num_rows"] >= 16, sidecar.facts
    assert open_cached_logits(tmp_path / "responses", sidecar.facts["num_rows"]).info.k == 4
    with pytest.raises(ArtifactError, match=r"has no genai_config\.json; give one variant's directory"):
        step.run(config, teacher=tiny_teacher, **inputs)


def test_the_logits_of_shards_make_those_of_the_whole(tiny_teacher: Path, train_rows: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    step.run(quick(logits_top_k=4), prompts=train_rows, teacher=tiny_teacher, responses=whole)
    shards = [tmp_path / f"shard-{shard}" for shard in range(3)]
    for shard, path in enumerate(shards):
        config = quick(logits_top_k=4, num_shards=3, shard=shard)
        step.run(config, prompts=train_rows, teacher=tiny_teacher, responses=path)
    merged = merge(MergeResponsesConfig(), shards=shards, responses=tmp_path / "merged")
    assert merged.facts["top_k"] == 4
    for name in (ROWS, RECORDS, ROW_STARTS, DESCRIPTION):
        assert (tmp_path / "merged" / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_teacher_that_never_ends_its_answers_is_an_error(
    tiny_teacher: Path, train_rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"no usable answer to 24 prompts .*raise max_new_tokens"):
        step.run(quick(max_new_tokens=1), prompts=train_rows, teacher=tiny_teacher, responses=tmp_path / "responses")
    assert not (tmp_path / "responses").exists()
