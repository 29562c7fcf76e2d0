"""generate_responses with endpoints, over a real HTTP server that is a double: it answers as the test says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.artifacts import Sidecar
from slmops.config import TEACHER_API_KEY
from slmops.errors import ArtifactError, ConfigError, DataError, TransientError, UserError
from slmops.generate_responses.config import GenerateResponsesConfig
from slmops.generate_responses.run import run
from slmops.merge_responses.config import MergeResponsesConfig
from slmops.merge_responses.run import run as merge
from slmops.records import ROWS, TOP_LOGPROBS, Provenance, read_jsonl, read_records
from slmops.teachers import endpoint
from tests.datasets import chat_record, commands, write_dataset
from tests.teachers import misbehaving
from tests.teachers.misbehaving import Reply, Server, completion


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint, "BACKOFF_S", 0.01)
    monkeypatch.delenv(TEACHER_API_KEY, raising=False)
    with misbehaving.serving() as server:
        yield server


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "prompts", commands(24, seed=5))


def configured(server: Server, **settings: Any) -> GenerateResponsesConfig:
    asked = {"teacher_kind": "endpoint", "endpoint_url": server.url, "endpoint_model": "big", "max_retries": 1}
    return GenerateResponsesConfig.create(asked | settings)


def generate(config: GenerateResponsesConfig, prompts: Path, responses: Path) -> Sidecar:
    return run(config, prompts=prompts, teacher=None, responses=responses)


def said(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def test_each_prompt_is_asked_once_and_answered_in_order(server: Server, prompts: Path, tmp_path: Path) -> None:
    sidecar = generate(configured(server), prompts, tmp_path / "responses")
    asked = [record.messages[-2].content for record in read_records(prompts)]
    rows = read_records(tmp_path / "responses")
    assert [row.completion for row in rows] == [text.upper() for text in asked]
    assert {row.provenance for row in rows} == {Provenance(teacher="big-v3", method="answer")}
    assert server.asked == Counter(asked)
    facts = sidecar.facts
    assert (facts["num_rows"], facts["num_asked"], facts["teacher"], facts["num_tokens"]) == (24, 24, "big-v3", 120)


def test_another_run_asks_only_what_is_new(server: Server, prompts: Path, tmp_path: Path) -> None:
    """Other rows and another place of the output; the teacher and how it answers are the same."""
    generate(configured(server, max_rows=16), prompts, tmp_path / "first")
    again = generate(configured(server, min_answer_chars=2, batch_size=7), prompts, tmp_path / "second")
    assert (again.facts["num_rows"], again.facts["num_asked"]) == (24, 8)
    assert set(server.asked.values()) == {1}
    other = generate(configured(server, decoding="sample", max_rows=4), prompts, tmp_path / "third")
    assert other.facts["num_asked"] == 4, "another way of decoding gives other answers"


def test_what_was_answered_before_a_failure_is_not_asked_again(server: Server, prompts: Path, tmp_path: Path) -> None:
    server.always = lambda _: Reply(500, {}) if sum(server.asked.values()) > 10 else None
    with pytest.raises(
        TransientError, match=r"1\d of 24 prompts have no answer \(server_error 1\d\).*run the same again"
    ):
        generate(configured(server, max_retries=0), prompts, tmp_path / "responses")
    assert not (tmp_path / "responses").exists()
    before = server.asked.copy()
    server.always = lambda _: None
    sidecar = generate(configured(server), prompts, tmp_path / "responses")
    assert sidecar.facts["num_rows"] == 24
    assert sum((server.asked - before).values()) == 14


def test_a_few_missing_answers_are_counted(server: Server, prompts: Path, tmp_path: Path) -> None:
    lost = read_records(prompts)[3].messages[-2].content
    server.always = lambda body: misbehaving.CUT if said(body) == lost else None
    sidecar = generate(configured(server, min_success_fraction=0.9), prompts, tmp_path / "responses")
    assert (sidecar.facts["num_rows"], sidecar.facts["dropped"]) == (23, {"no_answer": 1})


def test_a_budget_stops_and_can_be_raised(server: Server, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"budget is used up .*raise it and run the same command again"):
        generate(configured(server, max_total_tokens=40, max_in_flight=1), prompts, tmp_path / "responses")
    assert sum(server.asked.values()) == 5, "8 tokens each"
    prices = {"prompt_price": 1e6, "completion_price": 2e6}  # 3 + 10 for each answer
    with pytest.raises(UserError, match=r"cost 26\.00 of .*max_cost 20"):
        generate(configured(server, max_cost=20, max_in_flight=1, **prices), prompts, tmp_path / "responses")
    sidecar = generate(configured(server), prompts, tmp_path / "responses")
    assert sidecar.facts["num_rows"] == 24
    assert set(server.asked.values()) == {1}


def test_the_key_goes_to_the_endpoint_and_nowhere_else(
    server: Server, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.key = "sk-secret"
    with pytest.raises(UserError, match=rf"401.*{TEACHER_API_KEY}"):
        generate(configured(server), prompts, tmp_path / "responses")
    monkeypatch.setenv(TEACHER_API_KEY, "sk-secret")
    caplog.set_level("DEBUG", "slmops")
    generate(configured(server, top_logprobs=2), prompts, tmp_path / "responses")
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"sk-secret" not in written
    assert "sk-secret" not in caplog.text


def test_cut_answers_are_left_out_and_counted(server: Server, prompts: Path, tmp_path: Path) -> None:
    server.always = lambda body: Reply(payload=completion("half an ans", finish_reason="length"))
    with pytest.raises(DataError, match=r"truncated 24.*raise max_new_tokens"):
        generate(configured(server), prompts, tmp_path / "responses")


def test_answers_that_fail_a_check_are_counted_by_reason(server: Server, prompts: Path, tmp_path: Path) -> None:
    replies = ["I'm sorry, but I can't help with that.", "na " * 40, "{}", "[1]"]
    texts = [record.messages[-2].content for record in read_records(prompts)[:4]]
    server.always = lambda body: Reply(payload=completion(dict(zip(texts, replies, strict=True))[said(body)]))
    config = configured(server, max_rows=4, answer_pattern=r"\w")
    sidecar = generate(config, prompts, tmp_path / "responses")
    assert [row.completion for row in read_records(tmp_path / "responses")] == ["[1]"]
    assert sidecar.facts["dropped"] == {"loop": 1, "pattern": 1, "refusal": 1}
    assert sidecar.facts["num_dropped"] == 3


def test_alternatives_are_kept_as_they_are_given(server: Server, prompts: Path, tmp_path: Path) -> None:
    tokens = [{"token": "on", "logprob": -0.1, "top_logprobs": [{"token": "on", "logprob": -0.1}]}]

    def reply(body: dict[str, Any]) -> Reply:
        payload = completion("on")
        if body.get("top_logprobs") == 3:
            payload["choices"][0]["logprobs"] = {"content": tokens}
        return Reply(payload=payload)

    server.always = reply
    generate(configured(server, top_logprobs=3), prompts, tmp_path / "responses")
    kept = [row for _, row in read_jsonl(tmp_path / "responses" / TOP_LOGPROBS)]
    assert [row["id"] for row in kept] == [row.id for row in read_records(tmp_path / "responses")]
    assert kept[0]["tokens"][0]["logprob"] == -0.1


def test_prompts_go_to_the_teacher_for_their_task(server: Server, tmp_path: Path) -> None:
    sums = [chat_record(f"What is {n} + 1?", str(n + 1)).model_copy(update={"task": "mathematics"}) for n in range(20)]
    prompts = write_dataset(tmp_path / "prompts", [*sums, *commands(40, seed=5)])
    server.always = lambda body: (
        Reply(
            payload=completion(f"Adding one.\nAnswer: {int(re.findall(r'[0-9]+', said(body))[0]) + 1}", model="sums-1")
        )
        if body["model"] == "sums"
        else Reply(payload=completion("yes", model=body["model"]))
    )
    more = [
        {
            "name": "sums",
            "kind": "endpoint",
            "endpoint_url": server.url,
            "endpoint_model": "sums",
            "tasks": ["mathematics"],
        },
        {"name": "other", "kind": "endpoint", "endpoint_url": server.url, "endpoint_model": "other", "weight": 3},
    ]
    sidecar = generate(configured(server, more_teachers=more), prompts, tmp_path / "responses")
    rows = read_records(tmp_path / "responses")
    by_teacher = Counter(row.provenance.teacher for row in rows if row.provenance)
    assert by_teacher["sums-1"] == 20
    assert all("Answer: " in row.completion for row in rows if row.task == "mathematics")
    assert by_teacher["other"] > by_teacher["big"] > 0
    assert sidecar.facts["teacher"] == "big, other, sums-1"


def test_the_answer_that_most_samples_agree_on_is_kept(server: Server, prompts: Path, tmp_path: Path) -> None:
    """Of five samples of each prompt three say the same; where they all differ, the prompt is dropped."""
    seen: Counter[str] = Counter()

    def reply(body: dict[str, Any]) -> Reply:
        seen[said(body)] += 1
        odd = "light" in said(body) or seen[said(body)] % 2 == 0
        return Reply(payload=completion(f"odd {seen[said(body)]}" if odd else "same"))

    server.always = reply
    sampled = {"decoding": "sample", "num_samples": 5, "choose_by": "agreement", "min_agreement_fraction": 0.5}
    sidecar = generate(configured(server, **sampled), prompts, tmp_path / "responses")
    rows = read_records(tmp_path / "responses")
    assert {row.completion for row in rows} == {"same"}
    num_lights = sum("light" in text for text in seen)
    assert sidecar.facts["dropped"] == {"agreement": num_lights}
    assert set(seen.values()) == {5}
    assert len({body["seed"] for body in server.bodies}) == 5 * 24, "each sample of each prompt has a seed of its own"


def test_a_judge_chooses(server: Server, prompts: Path, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        if body["model"] == "judge":
            return Reply(payload=completion("9" if "answer 3" in said(body) else "2", model="judge"))
        return Reply(payload=completion(f"answer {body['seed'] % 4}", model="big"))

    server.always = reply
    judge = {"name": "wise", "kind": "endpoint", "endpoint_url": server.url, "endpoint_model": "judge", "weight": 0}
    sampled = {"decoding": "sample", "num_samples": 8, "choose_by": "judge", "judge": "wise", "more_teachers": [judge]}
    generate(configured(server, **sampled), prompts, tmp_path / "responses")
    chosen = Counter(row.completion for row in read_records(tmp_path / "responses"))
    offered = {said(body) for body in server.bodies if body["model"] == "judge"}
    assert chosen["answer 3"] >= 20, "it is among eight samples nearly always"
    assert len(offered) == sum(body["model"] == "judge" for body in server.bodies), "no answer is judged twice"


def test_shards_make_the_whole_in_the_order_of_the_prompts(server: Server, prompts: Path, tmp_path: Path) -> None:
    whole = generate(configured(server), prompts, tmp_path / "whole")
    shards = [tmp_path / f"shard-{shard}" for shard in range(5)]
    for shard, path in enumerate(shards):
        generate(configured(server, num_shards=5, shard=shard), prompts, path)
    merged = merge(MergeResponsesConfig(), shards=[shards[n] for n in (3, 0, 4, 1, 2)], responses=tmp_path / "merged")
    assert (tmp_path / "merged" / ROWS).read_bytes() == (tmp_path / "whole" / ROWS).read_bytes()
    for name in ("num_rows", "num_prompts", "num_dropped", "dropped", "num_tokens", "teacher"):
        assert merged.facts[name] == whole.facts[name], name
    with pytest.raises(ArtifactError, match=r"shards \[0, 1, 3\] are no complete set of 5"):
        merge(MergeResponsesConfig(), shards=[shards[n] for n in (0, 1, 3)], responses=tmp_path / "part")
    generate(configured(server, num_shards=5, shard=4, max_rows=20), prompts, tmp_path / "other")
    with pytest.raises(ArtifactError, match="was made from other config"):
        merge(MergeResponsesConfig(), shards=[*shards[:4], tmp_path / "other"], responses=tmp_path / "mixed")


def test_more_shards_than_prompts_leave_some_empty(server: Server, tmp_path: Path) -> None:
    prompts = write_dataset(tmp_path / "few", commands(2, seed=5))
    shards = [tmp_path / f"shard-{shard}" for shard in range(3)]
    for shard, path in enumerate(shards):
        generate(configured(server, num_shards=3, shard=shard), prompts, path)
    assert merge(MergeResponsesConfig(), shards=shards, responses=tmp_path / "merged").facts["num_rows"] == 2
    with pytest.raises(DataError, match=r"3 shards have 2 rows, less than min_rows=3"):
        merge(MergeResponsesConfig(min_rows=3), shards=shards, responses=tmp_path / "merged")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logits_top_k": 8}, "an endpoint gives text"),
        ({"num_samples": 3}, "needs decoding=sample"),
        ({"choose_by": "judge"}, "needs num_samples of 2 or more"),
        (
            {"decoding": "sample", "num_samples": 2, "choose_by": "judge", "judge": "nobody"},
            "must name one of the teachers",
        ),
        ({"num_shards": 4, "shard": 4}, "shard must be less than num_shards=4"),
        ({"more_teachers": [{"name": "teacher"}]}, "names must differ"),
        ({"teacher_weight": 0}, "weight above 0"),
        ({"temperature": 0.5}, "need decoding=sample"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerateResponsesConfig.create({"teacher_kind": "endpoint"} | settings)


def test_a_model_is_asked_for_where_one_is_needed(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="teacher of kind model needs a model"):
        generate(GenerateResponsesConfig(), prompts, tmp_path / "responses")


def test_a_task_that_nobody_knows_is_said_before_anything_is_asked(server: Server, tmp_path: Path) -> None:
    record = chat_record("a", "b").model_copy(update={"task": "cooking"})
    with pytest.raises(ConfigError, match=r"no task is called 'cooking'; the tasks are: chat, .*mathematics"):
        generate(configured(server), write_dataset(tmp_path / "prompts", [record]), tmp_path / "responses")
    assert not server.bodies
