"""synthesize: new prompts that are new, questions whose answers stand in their passages, and the end of it.

`Scripted` is a double: a teacher whose answers a test writes. One test asks a real model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops import artifacts
from slmops.checks import Checks
from slmops.errors import ConfigError, DataError, TransientError
from slmops.prepare_data.chats import ids_of
from slmops.records import ChatRecord, Message, id_of, read_records
from slmops.storage import open_store
from slmops.synthesize import run as step
from slmops.synthesize.asking import Desk, Request
from slmops.synthesize.config import SynthesizeConfig
from slmops.synthesize.documents import Document, passages, read_documents
from slmops.synthesize.from_documents import from_documents
from slmops.synthesize.novelty import Novelty
from slmops.synthesize.self_instruct import numbered_items, self_instruct
from slmops.tasks.overlap import rouge_l
from slmops.tasks.registry import Tasks
from slmops.teachers.interface import STOP, Answer, Failure, Question
from slmops.teachers.mixture import Mixture
from tests.datasets import chat_record, write_dataset

Script = Callable[[str], str | Answer | Failure]
"""What is said to the last turn of a prompt."""

SEEDS = [chat_record(f"Where can I {verb} my {thing}?", "In the app.") for verb in ("see", "lock") for thing in "abcd"]
LIST = "1. How do I change my address?\n2. Why was I charged twice?\n3. Can children have an account?"


class Scripted:
    """A teacher that says what the test says."""

    name = "teacher"

    def __init__(self, script: Script) -> None:
        self.script = script
        self.identity: Mapping[str, str | int | float] = {"kind": "scripted"}
        self.asked: list[str] = []

    def answer(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Answer | Failure]]:
        for question in reversed(list(questions)):
            self.asked.append(question.messages[-1]["content"])
            said = self.script(self.asked[-1])
            yield question, Answer(said, STOP, "scripted-1") if isinstance(said, str) else said

    def close(self) -> None: ...


def as_in_prepare_data(messages: Sequence[Message]) -> str:
    return ids_of(tuple((turn.role, turn.content) for turn in messages))[0]


def config(**fields: Any) -> SynthesizeConfig:
    return SynthesizeConfig.create({"num_rows": 3, "max_requests": 5} | fields)


def made(
    script: Script, fields: Mapping[str, Any], source: Iterable[ChatRecord] | Sequence[Document]
) -> tuple[list[ChatRecord], Counter[str]]:
    """Rows and drops of the method that fits `source`, without files."""
    settings = config(**fields)

    def ask(requests: Sequence[Request]) -> list[Answer | None]:
        answers = []
        for request in requests:
            said = script(request.messages[-1]["content"])
            answers.append(Answer(said, STOP, "scripted-1") if isinstance(said, str) else said)
        return [answer if isinstance(answer, Answer) else None for answer in answers]

    desk = Desk(ask, Mixture(settings.teachers(), 0), Tasks(settings.task_settings), Checks(settings))
    method: Any = from_documents if settings.method == "documents" else self_instruct
    return list(method(settings, source, desk)), desk.drops


def is_request(prompt: str) -> bool:
    return "examples of what people write" in prompt


class TestSelfInstruct:
    def test_new_prompts_are_answered_and_say_where_they_come_from(self) -> None:
        asked: list[str] = []

        def script(prompt: str) -> str:
            asked.append(prompt)
            return LIST if is_request(prompt) else f"An answer to: {prompt}"

        rows, drops = made(script, {"prompts_per_request": 3}, SEEDS)
        assert [row.messages[0].content for row in rows] == [line[3:] for line in LIST.splitlines()]
        assert rows[0].completion == "An answer to: How do I change my address?"
        assert not drops
        source = rows[0].provenance
        assert source is not None
        assert (source.teacher, source.method, len(source.sources)) == ("scripted-1", "self_instruct", 6)
        texts = {seed.id: seed.messages[0].content for seed in SEEDS}
        assert all(texts[seed_id] in asked[0] for seed_id in source.sources), "the examples that were shown"
        assert "In the app." not in asked[0], "answers of seeds are not shown"

    def test_what_was_there_is_dropped(self) -> None:
        said = (
            "1. Where can I see my a?\n2. Where can I lock the a?\n3. Hi\n4. Is tea better than coffee?\n5. " + "x" * 99
        )
        rows, drops = made(
            lambda prompt: said if is_request(prompt) else "Yes.", {"max_requests": 2, "max_prompt_chars": 80}, SEEDS
        )
        assert [row.messages[0].content for row in rows] == ["Is tea better than coffee?"]
        assert drops == {"not_novel": 5, "prompt_too_short": 2, "prompt_too_long": 2}, "two requests, the same list"

    def test_it_ends_when_nothing_new_comes(self) -> None:
        rows, drops = made(lambda prompt: "I would rather not.", {"max_requests": 7}, SEEDS)
        assert rows == []
        assert drops == {"no_list": 7}

    def test_answers_pass_their_task_and_the_checks(self) -> None:
        labels = {"classification": {"labels": ["card", "account"]}}
        seeds = [seed.model_copy(update={"task": "classification"}) for seed in SEEDS]
        said = {
            "address": "Account.",
            "charged": "card or account",
            "children": "I'm sorry, but I can't help with that.",
        }

        def script(prompt: str) -> str:
            return LIST if is_request(prompt) else next(text for word, text in said.items() if word in prompt)

        rows, drops = made(script, {"max_requests": 1, "task_settings": labels}, seeds)
        assert [(row.task, row.completion) for row in rows] == [("classification", "account")]
        assert drops == {"several_labels": 1, "no_label": 1}
        rows, drops = made(script, {"max_requests": 1}, SEEDS)
        assert drops == {"refusal": 1}

    def test_a_list_that_was_cut_off_loses_its_last_item(self) -> None:
        def script(prompt: str) -> str | Answer:
            if is_request(prompt):
                return Answer(LIST, "length", "scripted-1")
            return Answer("Because", "length", "s") if "charged" in prompt else "Yes."

        rows, drops = made(script, {"max_requests": 1}, SEEDS)
        assert [row.messages[0].content for row in rows] == ["How do I change my address?"]
        assert drops == {"truncated": 2}

    def test_a_system_turn_stays_with_its_prompts(self) -> None:
        def with_system(record: ChatRecord) -> ChatRecord:
            return record.model_copy(
                update={"messages": (Message(role="system", content="Be brief."), *record.messages)}
            )

        rows, _ = made(
            lambda prompt: LIST if is_request(prompt) else "Yes.", {}, [with_system(record) for record in SEEDS]
        )
        assert {row.messages[0].content for row in rows} == {"Be brief."}

    def test_seeds_of_several_turns_are_no_examples(self) -> None:
        turns = (*SEEDS[0].messages, *SEEDS[1].messages)
        with pytest.raises(DataError, match="none of 1 seeds is a single request"):
            made(lambda prompt: LIST, {}, [SEEDS[0].model_copy(update={"messages": turns})])

    def test_the_same_settings_make_the_same_rows(self) -> None:
        def script(prompt: str) -> str:
            return (
                f"1. Is {crc32(prompt.encode()) % 9973} prime?\n2. Who sells {prompt[70:90]}?"
                if is_request(prompt)
                else "Yes."
            )

        fields = {"num_rows": 12, "max_requests": 40, "novelty_threshold": 0.95}
        first, second = (made(script, fields, SEEDS) for _ in range(2))
        assert first == second
        assert 4 < len(first[0]) <= 12

    @pytest.mark.parametrize(
        ("text", "items"),
        [
            ("Sure!\n1. One\n2) Two\nwith two lines\n3: Three", ["One", "Two\nwith two lines", "Three"]),
            ("7. Seven\n8. Eight", ["Seven", "Eight"]),
            ('1. "Quoted?"\n**2.** Bold', ["Quoted?", "Bold"]),
            ("1. Sort these:\n4. four\n5. five\n2. Next", ["Sort these:\n4. four\n5. five", "Next"]),
            ("1. One\n\nin two parts\n2. Two\n\nHere they are again:\n1. One\n2. Two", ["One\n\nin two parts", "Two"]),
            ("- one\n- two", []),
            ("", []),
        ],
    )
    def test_numbered_lists_are_read(self, text: str, items: list[str]) -> None:
        assert numbered_items(text) == items


class TestNovelty:
    @given(
        st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8).map(" ".join), max_size=25),
        st.sampled_from([0.3, 0.5, 0.7, 1.0]),
    )
    @settings(max_examples=60, deadline=None)
    def test_the_index_misses_nothing_and_drops_nothing_else(self, texts: list[str], threshold: float) -> None:
        novelty, kept = Novelty(threshold), list[str]()
        for text in texts:
            novel = all(rouge_l(text, other) < threshold for other in kept)
            assert novelty.add_if_novel(text) is novel, text
            kept += [text] if novel else []
        assert len(novelty) == len(kept)

    def test_case_and_punctuation_make_nothing_new(self) -> None:
        novelty = Novelty(1.0)
        novelty.add("Where is my card?")
        assert not novelty.add_if_novel("where is MY card")
        assert novelty.add_if_novel("where is your card")
        assert not novelty.add_if_novel("?!")


PARAGRAPHS = [
    "The bridge of Basel was built in 1225 by Bishop Heinrich von Thun. It was the first over the Rhine there.",
    "In 1905 it was replaced by a bridge of granite. The new one carries trams.",
    "Its chapel was moved to the middle of the new bridge.",
]
TEXT = "\n\n".join(PARAGRAPHS)
ITEM = {
    "question": "Who built the bridge of Basel?",
    "answer": "Bishop Heinrich von Thun",
    "evidence": "The bridge of Basel was built in 1225 by Bishop Heinrich von Thun.",
}
DOCUMENTS = {"method": "documents", "documents_uri": "unused"}


class TestDocuments:
    def test_questions_are_grounded_in_their_passage(self) -> None:
        def script(prompt: str) -> str:
            return "```json\n" + json.dumps([ITEM]) + "\n```"

        rows, drops = made(script, DOCUMENTS, [Document("basel.md", TEXT)])
        (row,) = rows
        assert not drops
        assert row.task == "question_answering"
        assert row.messages[0].content == f"Passage:\n{TEXT}\n\nQuestion: Who built the bridge of Basel?"
        assert row.completion == "Bishop Heinrich von Thun"
        assert row.provenance is not None
        assert row.provenance.sources == (f"basel.md#0-{len(TEXT) - 1}",)
        assert row.id == as_in_prepare_data(row.messages)

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"evidence": "The bridge of Zurich was built by Bishop Heinrich von Thun."}, "evidence_not_in_passage"),
            ({"answer": "granite"}, "answer_not_in_evidence"),
            ({"answer": 1225}, "not_an_item"),
            ({"question": "Who?"}, "prompt_too_short"),
            ({"question": "Who" * 1000}, "prompt_too_long"),
        ],
    )
    def test_what_is_not_grounded_is_dropped(self, change: dict[str, Any], why: str) -> None:
        rows, drops = made(lambda prompt: json.dumps([ITEM | change, ITEM]), DOCUMENTS, [Document("a", TEXT)])
        assert len(rows) == 1
        assert drops == {why: 1}

    def test_each_question_counts_once_and_the_target_is_kept(self) -> None:
        others = [ITEM | {"question": f"Who built the bridge, question {number}?"} for number in range(5)]
        rows, drops = made(lambda prompt: json.dumps([ITEM, ITEM, *others]), DOCUMENTS, [Document("a", TEXT)] * 2)
        assert len(rows) == 3
        assert drops == {"duplicate": 1}
        rows, drops = made(lambda prompt: "no JSON", DOCUMENTS, [Document("a", TEXT)] * 9)
        assert (rows, drops) == ([], {"not_json": 5}), "max_requests ends it"

    @given(
        st.lists(st.text(alphabet="ab .\n", min_size=0, max_size=120), max_size=12).map("\n\n".join),
        st.integers(20, 80),
        st.integers(0, 20),
    )
    @settings(max_examples=60)
    def test_passages_hold_all_of_a_text_in_order(self, text: str, max_chars: int, overlap: int) -> None:
        cut = list(passages(Document("a", text), max_chars, overlap))
        assert all(text[part.first : part.end] == part.text and 0 < len(part.text) <= max_chars for part in cut)
        assert all(after.first > before.first and after.end > before.end for before, after in pairwise(cut))
        assert all(before.end - after.first <= overlap for before, after in pairwise(cut))
        covered = {position for part in cut for position in range(part.first, part.end)}
        assert not "".join(text[position] for position in range(len(text)) if position not in covered).strip()

    def test_passages_end_at_paragraphs_and_overlap(self) -> None:
        document = Document("a", TEXT)
        assert [part.text for part in passages(document, 120, 0)] == [PARAGRAPHS[0], PARAGRAPHS[1], PARAGRAPHS[2]]
        first, second = passages(document, 200, 80)
        assert first.text == "\n\n".join(PARAGRAPHS[:2])
        assert second.text == "\n\n".join(PARAGRAPHS[1:])
        assert [part.text for part in passages(document, 70, 0)][:2] == PARAGRAPHS[0].replace(". It", ".\nIt").split(
            "\n"
        )
        assert [len(part.text) for part in passages(Document("a", "x" * 250), 100, 0)] == [100, 100, 50]

    def test_files_of_a_folder_are_read_by_name(self, tmp_path: Path) -> None:
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "b.txt").write_bytes(b"\xef\xbb\xbfBee")
        (tmp_path / "a.md").write_text("Ay")
        (tmp_path / "c.jsonl").write_text('{"text": "See"}\n\n{"text": "Sea"}\n')
        (tmp_path / "image.png").write_bytes(b"\x89PNG")
        assert [(document.name, document.text) for document in read_documents(tmp_path, "text")] == [
            ("a.md", "Ay"), ("c.jsonl:1", "See"), ("c.jsonl:3", "Sea"), ("deep/b.txt", "Bee"),
        ]  # fmt: skip

    def test_files_that_are_no_documents_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"holds no documents; they end in .txt, .md, .jsonl"):
            list(read_documents(tmp_path, "text"))
        (tmp_path / "a.txt").write_bytes(b"ok \xff")
        with pytest.raises(DataError, match=r"not UTF-8 .* at byte 3"):
            list(read_documents(tmp_path / "a.txt", "text"))
        (tmp_path / "b.jsonl").write_text('{"body": "See"}\n')
        with pytest.raises(DataError, match=r"b.jsonl:1: 'text' must be a text, .* has 'body'; set text_field"):
            list(read_documents(tmp_path / "b.jsonl", "text"))


class TestStep:
    """The whole step with its files, around a scripted teacher."""

    @staticmethod
    def run(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teacher: Scripted, seeds: Path | None, **fields: Any
    ) -> dict[str, Any]:
        monkeypatch.setattr(step, "open_teacher", lambda *_, **__: nullcontext(teacher))
        settings = config(teacher_kind="endpoint", **fields)
        return step.run(settings, seeds=seeds, teacher=None, rows=tmp_path / "rows").facts

    def test_rows_are_an_artifact_with_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        said = LIST + "\n4. Where can I see my a?"
        teacher = Scripted(lambda prompt: said if is_request(prompt) else "Yes, you can.")
        facts = self.run(
            monkeypatch, tmp_path, teacher, write_dataset(tmp_path / "seeds", SEEDS), prompts_per_request=3
        )
        assert facts == {"num_rows": 3, "num_requests": 1, "num_dropped_not_novel": 1}
        assert len(read_records(tmp_path / "rows")) == 3
        assert {path.name for path in tmp_path.iterdir()} == {"seeds", "rows", step.ANSWERS}, "nothing else is left"
        assert artifacts.read(tmp_path / "rows").ancestors[0].kind == "chat_dataset"

    def test_nothing_is_asked_twice_after_a_kill(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seeds = write_dataset(tmp_path / "seeds", SEEDS)

        def dies(prompt: str) -> str:
            if "charged" in prompt:
                raise KeyboardInterrupt
            return LIST if is_request(prompt) else "Yes, you can."

        with pytest.raises(KeyboardInterrupt):
            self.run(monkeypatch, tmp_path, Scripted(dies), seeds, prompts_per_request=3)
        assert not (tmp_path / "rows").exists()
        again = Scripted(lambda prompt: LIST if is_request(prompt) else "Yes, you can.")
        facts = self.run(monkeypatch, tmp_path, again, seeds, prompts_per_request=3)
        assert facts["num_rows"] == 3
        assert again.asked == ["Why was I charged twice?", "How do I change my address?"]
        self.run(monkeypatch, tmp_path, once_more := Scripted(dies), seeds, prompts_per_request=3)
        assert once_more.asked == []

    def test_failures_are_counted_and_a_dead_teacher_ends_the_step(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seeds = write_dataset(tmp_path / "seeds", SEEDS)

        def script(prompt: str) -> str | Failure:
            if "charged" in prompt:
                return Failure("timeout", "600 s")
            return LIST if is_request(prompt) else "Yes, you can."

        facts = self.run(monkeypatch, tmp_path, Scripted(script), seeds, max_requests=1)
        assert facts["num_dropped_no_answer_timeout"] == 1
        assert facts["num_rows"] == 2
        with pytest.raises(TransientError, match=r"not one of 1 questions was answered \(timeout 1\)"):
            self.run(monkeypatch, tmp_path, Scripted(lambda _: Failure("timeout", "")), seeds, seed=1)

    def test_documents_become_rows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "basel.md").write_text(TEXT)
        teacher = Scripted(lambda prompt: json.dumps([ITEM]))
        uri = str(tmp_path / "basel.md")
        facts = self.run(monkeypatch, tmp_path, teacher, None, method="documents", documents_uri=uri)
        assert facts == {"num_rows": 1, "num_requests": 1}

    def test_documents_may_lie_in_a_bucket(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
        store = open_store(f"{bucket}/docs")
        for name in ("basel.md", "deep/more.txt", "picture.png"):
            store.create(name, f"{TEXT}\n\nThis is {name}.".encode())
        teacher = Scripted(lambda prompt: json.dumps([ITEM | {"question": f"Who built it, {crc32(prompt.encode())}?"}]))
        for uri, names in (("docs", ["basel.md", "deep/more.txt"]), ("docs/basel.md", ["basel.md"])):
            fields = {"method": "documents", "documents_uri": f"{bucket}/{uri}"}
            self.run(monkeypatch, tmp_path, teacher, None, **fields)
            found = [row.provenance.sources[0] for row in read_records(tmp_path / "rows") if row.provenance]
            assert [source.partition("#")[0] for source in found] == names

    def test_a_real_model_is_asked_and_its_answers_are_kept(self, tmp_path: Path, tiny_model: Path) -> None:
        """A model of random parameters writes no list, but it is opened, asked and cached as any other is."""
        seeds = write_dataset(tmp_path / "seeds", SEEDS)
        settings = config(max_requests=2, max_new_tokens=8, dtype="float32")
        for _ in range(2):
            with pytest.raises(DataError, match=r"nothing usable in 2 requests \(dropped: "):
                step.run(settings, seeds=seeds, teacher=tiny_model, rows=tmp_path / "rows")
        (segment,) = (tmp_path / step.ANSWERS).rglob("*.jsonl")
        assert len(segment.read_text().splitlines()) == 2, "the second run asked nothing"

    def test_no_rows_is_an_error_that_says_why(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seeds = write_dataset(tmp_path / "seeds", SEEDS)
        with pytest.raises(DataError, match=r"nothing usable in 5 requests \(dropped: no_list 5\); use a larger"):
            self.run(monkeypatch, tmp_path, Scripted(lambda _: "No."), seeds)
        assert not (tmp_path / "rows").exists()

    def test_inputs_fit_the_method(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="method=self_instruct needs seeds"):
            step.run(config(), seeds=None, teacher=None, rows=tmp_path / "rows")
        with pytest.raises(ConfigError, match="method=documents takes no seeds"):
            step.run(config(**DOCUMENTS), seeds=tmp_path, teacher=None, rows=tmp_path / "rows")

    @pytest.mark.parametrize(
        ("fields", "why"),
        [
            ({"method": "documents"}, "documents_uri goes with method=documents"),
            ({"documents_uri": "docs"}, "documents_uri goes with method=documents"),
            ({"passage_chars": 300}, None),
            ({"passage_chars": 300, "passage_overlap_chars": 151}, "at most half of passage_chars, got 151 of 300"),
            ({"min_prompt_chars": 9, "max_prompt_chars": 8}, "must not exceed max_prompt_chars, got 9 and 8"),
        ],
    )
    def test_settings_that_contradict_each_other(self, fields: dict[str, Any], why: str | None) -> None:
        if why is None:
            config(**fields, passage_overlap_chars=150)
            return
        with pytest.raises(ConfigError, match=why):
            config(**fields)


def test_an_id_is_the_one_that_prepare_data_gives() -> None:
    messages = SEEDS[0].messages
    assert id_of(messages) == as_in_prepare_data(messages)
