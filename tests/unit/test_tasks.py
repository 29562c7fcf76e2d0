"""Tasks: what the teacher is asked, what of its answer is learned, and when an answer is right."""

from __future__ import annotations

import csv
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.errors import ConfigError
from slmops.records import ChatRecord, Message
from slmops.tasks import registry
from slmops.tasks.classification import Classification
from slmops.tasks.extraction import Extraction
from slmops.tasks.interface import Rejected, Task
from slmops.tasks.mathematics import Mathematics, final_answer, parse_number
from slmops.tasks.nli import NLI
from slmops.tasks.overlap import rouge_l
from slmops.tasks.question_answering import PROMPT, QuestionAnswering
from slmops.tasks.registry import Tasks
from slmops.tasks.summarisation import Summarisation, entities
from tests.datasets import chat_record

DATA = Path(__file__).parents[3] / "shared" / "data"

public_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the public data sets are not at {DATA}")


def parsed(task: Task, text: str, record: ChatRecord) -> str:
    """What is learned from `text`; `(reason)` if nothing is."""
    try:
        return task.parse(text, record)
    except Rejected as rejected:
        return f"({rejected.reason})"


def asked(task: Task, record: ChatRecord) -> str:
    return task.ask(record)[-1]["content"]


class TestRegistry:
    def test_an_unknown_task_is_told_what_there_is(self) -> None:
        with pytest.raises(
            ConfigError, match=r"no task is called 'translation'.*chat, classification, extraction, math"
        ):
            Tasks({}).named("translation")

    def test_settings_are_checked_before_anything_is_asked(self) -> None:
        with pytest.raises(ConfigError, match="labels must be two or more, found only yes"):
            Tasks({"classification": {"labels": ["yes"]}})
        with pytest.raises(ConfigError, match="no task is called"):
            Tasks({"clasification": {}})
        with pytest.raises(ConfigError, match="task_settings of nli must be an object"):
            Tasks({"nli": ["yes", "no"]})
        with pytest.raises(ConfigError, match="label: extra inputs are not permitted"):
            Tasks({"classification": {"label": ["yes", "no"]}})

    def test_settings_reach_the_task_and_others_keep_their_defaults(self) -> None:
        tasks = Tasks({"classification": {"labels": ["yes", "no"]}})
        task = tasks.named("classification")
        assert isinstance(task, Classification)
        assert task.labels == ["yes", "no"]
        assert isinstance(tasks.of(chat_record("Hi", "Hello")), Task)

    def test_two_packages_with_one_name_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        points = [metadata.EntryPoint("chat", f"{module}:Chat", registry.GROUP) for module in ("ours", "theirs")]
        monkeypatch.setattr(metadata, "entry_points", lambda group: points)
        with pytest.raises(ConfigError, match="several tasks are called chat: ours:Chat, theirs:Chat"):
            registry.find("chat")

    @pytest.mark.parametrize("where", ["json:loads", "json:absent", "absent_package.tasks:Task"])
    def test_an_entry_point_that_is_no_task_is_named(self, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        points = [metadata.EntryPoint("ours", where, registry.GROUP)]
        monkeypatch.setattr(metadata, "entry_points", lambda group: points)
        with pytest.raises(ConfigError, match=f"task ours .*{where}"):
            registry.find("ours")


def test_a_conversation_is_asked_as_it_stands() -> None:
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Bye bye")]
    messages = tuple(Message.model_validate({"role": role, "content": text}) for role, text in turns)
    record = ChatRecord(id="0" * 16, messages=messages)
    chat = Tasks({}).of(record)
    assert [turn["content"] for turn in chat.ask(record)] == ["Be kind.", "Hi", "Hello", "Bye"]
    assert parsed(chat, " See you.\n", record) == " See you.\n", "the teacher's distribution is about every character"
    assert parsed(chat, " \n", record) == "(empty)"


def test_the_guides_own_task_works_from_a_package_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "guide" / "tasks.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (point,) = re.findall(r'entry-points."slmops.tasks"\]\n *(\w+) = "(.*)"', page)
    (tmp_path / "our_tasks.py").write_text(code)
    (tmp_path / "ours-1.0.dist-info").mkdir()
    (tmp_path / "ours-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: ours\nVersion: 1.0\n")
    (tmp_path / "ours-1.0.dist-info" / "entry_points.txt").write_text(f"[slmops.tasks]\n{point[0]} = {point[1]}\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    assert "translation" in registry.names()
    task = Tasks({"translation": {"language": "French"}}).named("translation")
    record = chat_record("Hello {name}!", "Bonjour {name} !")
    assert asked(task, record) == "Hello {name}!\n\nTranslate this into French. Keep what stands in braces."
    assert parsed(task, "Salut {name} !", record) == "Salut {name} !"
    assert parsed(task, "Salut !", record) == "(placeholder_lost)"
    assert task.metrics([("Salut !", record.completion)])["placeholders_kept"] == 0
    with pytest.raises(ConfigError, match="tongue: extra inputs are not permitted"):
        Tasks({"translation": {"tongue": "French"}})


class TestClassification:
    LABELS = ("card_arrival", "card_payment", "card_payment_fee", "lost card")

    @pytest.mark.parametrize(
        ("text", "label"),
        [
            ("card_arrival", "card_arrival"),
            (' "Card_Arrival".\n', "card_arrival"),
            ("**LOST CARD**", "lost card"),
            ("It asks for the date.\nAnswer: card_payment", "card_payment"),
            ("The label is card_payment_fee.", "card_payment_fee"),
            ("I would say card_arrival; yes, card_arrival.", "card_arrival"),
            ("card_payment or card_arrival", "(several_labels)"),
            ("card_arrival\ncard_payment", "(several_labels)"),
            ("This is not card_arrival.", "(no_label)"),
            ("**lost card**, since it is not there any more", "lost card"),
            ("card_arrivals", "(no_label)"),
            ("lost", "(no_label)"),
            ("I don't know.", "(no_label)"),
        ],
    )
    def test_a_label_is_read_tolerantly_and_never_guessed(self, text: str, label: str) -> None:
        assert parsed(Classification(labels=list(self.LABELS)), text, chat_record("Where?", "card_arrival")) == label

    def test_labels_may_stand_in_the_prompt(self) -> None:
        record = chat_record("Is it warm?\nLabels: Yes, No", "Yes")
        assert "exactly one of these labels and nothing else: Yes, No" in asked(Classification(), record)
        assert parsed(Classification(), "yes.", record) == "Yes"
        assert parsed(Classification(), "maybe", record) == "(no_label)"

    @pytest.mark.parametrize(
        ("text", "label"),
        [
            ("No, the first does not say the same.", "No"),
            ("Yes. It cannot be otherwise.", "Yes"),
            ("no - nothing", "No"),
            ("I do not think so, no", "(no_label)"),
            ("Yes, No.", "(several_labels)"),
            ("No one knows, but I cannot tell.", "(no_label)"),
            ("Nothing", "(no_label)"),
        ],
    )
    def test_an_opening_label_counts_whatever_is_negated_behind_it(self, text: str, label: str) -> None:
        assert parsed(Classification(labels=["Yes", "No"]), text, chat_record("?", "!")) == label

    def test_a_prompt_without_labels_stops_before_anything_is_paid(self) -> None:
        with pytest.raises(ConfigError, match="names no labels, and neither does task_settings"):
            Classification().ask(chat_record("Is it warm?", "Yes"))

    def test_labels_that_look_alike_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="labels must differ by more than case and quotes, found yes twice"):
            Classification.create({"labels": ["Yes", "yes.", "no"]})

    @given(
        st.permutations(LABELS), st.sampled_from(["{}", "{}.", '"{}"', "Label: {}", "**{}**", "{}\n"]), st.booleans()
    )
    @settings(max_examples=30)
    def test_each_label_is_found_in_any_dress(self, labels: list[str], dress: str, upper: bool) -> None:
        text = dress.format(labels[0].upper() if upper else labels[0])
        assert parsed(Classification(labels=labels), text, chat_record("?", "!")) == labels[0]

    def test_figures(self) -> None:
        task = Classification(labels=["a", "b"])
        figures = task.metrics([("a", "a"), ("A.", "a"), ("b", "a"), ("b", "b"), ("what?", "b")])
        assert figures["label_accuracy"] == pytest.approx(3 / 5)
        assert figures["macro_f1"] == pytest.approx((4 / 5 + 1 / 2) / 2)
        assert not task.correct("what?", "b")


def test_nli_explains_its_labels_unless_they_are_others() -> None:
    record = chat_record("A dog runs. / An animal moves.", "entailment")
    assert "contradiction: it cannot be true, given the first" in asked(NLI(), record)
    assert parsed(NLI(), "Entailment.", record) == "entailment"
    assert parsed(NLI(), "Not a contradiction.", record) == "(no_label)"
    assert "labels and nothing else: Yes, No" in asked(NLI(labels=["Yes", "No"]), record)


class TestQuestionAnswering:
    RECORD = chat_record(
        PROMPT.format(passage="In 1879 the Great Northern hotel, with 40 rooms, burned down.", question="What burned?"),
        "the Great Northern",
    )

    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("Great Northern hotel", "Great Northern hotel"),
            ('Answer: "great northern hotel."', "great northern hotel."),
            ("What burned", "(not_in_passage)"),
            ("Northern hot", "(not_in_passage)"),
            ("the", "(not_in_passage)"),
            ("Unanswerable.", "(unanswerable)"),
        ],
    )
    def test_an_answer_stands_in_the_passage(self, text: str, answer: str) -> None:
        assert parsed(QuestionAnswering(), text, self.RECORD) == answer

    def test_a_reference_may_be_unanswerable(self) -> None:
        record = chat_record(PROMPT.format(passage="It rains.", question="Why?"), "unanswerable")
        assert parsed(QuestionAnswering(), "unanswerable", record) == "unanswerable"

    def test_answers_compare_as_in_squad(self) -> None:
        task = QuestionAnswering()
        assert task.correct("The Great  Northern!", "great northern")
        figures = task.metrics([("the great northern hotel", "Great Northern"), ("1879", "1879")])
        assert figures == {"squad_exact_match": 0.5, "squad_f1": pytest.approx((2 * 2 / 5 + 1) / 2)}

    @pytest.mark.parametrize(("pattern", "why"), [("(", "no regular expression"), ("a(b)(c)", "must have one group")])
    def test_a_pattern_that_finds_no_passage_is_refused(self, pattern: str, why: str) -> None:
        with pytest.raises(ConfigError, match=why):
            QuestionAnswering.create({"passage_pattern": pattern})


class TestMathematics:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("2 + 2 = 4.\nAnswer: 4", "4"),
            ("Answer: 3. No, wait.\n**Answer:** 4 apples", "4 apples"),
            (r"So it is $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
            ("He has 3.\n#### 3", "3"),
            ("So the answer is 42.", "42."),
            ("The final answer is: $12.50", "$12.50".lstrip("$")),
            ("72", "72"),
            ("I have no idea.", None),
            (r"\boxed{1", None),
        ],
    )
    def test_the_final_answer_is_found(self, text: str, answer: str | None) -> None:
        assert final_answer(text) == answer

    @pytest.mark.parametrize(
        ("one", "other", "same"),
        [
            ("1,234", "1234", True),
            ("0.5", r"\frac{1}{2}", True),
            ("1 1/2", "1.5", True),
            ("3/6", "1/2", True),
            ("50%", "50", True),
            ("50 %", "0.5", True),
            ("50%", "5", False),
            ("$3.00", "3 dollars", True),
            ("12 km/h", "12", True),
            (r"5\text{ cm}^2", "5", True),
            ("-7", "−7", True),
            ("x = 7", "7", True),
            ("1e3", "1000", True),
            ("0.333", "1/3", False),
            ("1/0", "1", False),
            ("12", "120", False),
            ("(2, 3)", "(2,3)", True),
            ("2x + 1", "2x+1", True),
            ("2x + 1", "2", False),
            ("about 4 or 5", "4", False),
        ],
    )
    def test_answers_compare_as_numbers(self, one: str, other: str, same: bool) -> None:
        task = Mathematics()
        assert task.correct(f"Answer: {one}", f"#### {other}") is same
        assert task.correct(f"Answer: {other}", f"#### {one}") is same

    def test_a_huge_exponent_costs_nothing(self) -> None:
        assert parse_number("1e999999999") is None
        assert parse_number("9" * 1000) is None

    @given(st.fractions(-(10**6), 10**6, max_denominator=1000))
    @settings(max_examples=40)
    def test_any_fraction_is_read_as_itself(self, value: Any) -> None:
        number = parse_number(f"{value.numerator}/{value.denominator}")
        assert number is not None
        assert number.value == value

    def test_a_wrong_answer_is_dropped_where_the_row_knows_better(self) -> None:
        record = chat_record("What is 6 * 7?", "6 * 7 = 42. #### 42")
        assert "Think step by step" in asked(Mathematics(), record)
        assert parsed(Mathematics(), "6 * 7 = 42\nAnswer: 42", record) == "6 * 7 = 42\nAnswer: 42"
        assert parsed(Mathematics(), "Answer: 41", record) == "(wrong_answer)"
        assert parsed(Mathematics(), "It is large", record) == "(no_final_answer)"
        assert parsed(Mathematics(reference="ignore"), "Answer: 41", record) == "Answer: 41"
        assert parsed(Mathematics(), "Answer: 41", chat_record("What is 6 * 7?", "unknown")) == "Answer: 41"


class TestSummarisation:
    SOURCE = (
        "The council of Basel decided on Tuesday to close the old bridge for 18 months. Anna Keller, who leads the "
        "works, said the repairs cost 4.5 million francs. Shops nearby fear for their trade, and want the city to pay."
    )
    RECORD = chat_record(SOURCE, "Basel closes a bridge.")

    @staticmethod
    def steps(*summaries: str) -> str:
        return json.dumps([{"missing_entities": "", "denser_summary": summary} for summary in summaries])

    def test_the_last_summary_is_kept(self) -> None:
        assert "Write 5 summaries" in asked(Summarisation(), self.RECORD)
        text = self.steps("A bridge is closed.", "Basel closes the bridge for 18 months; Keller says 4.5 million.")
        assert parsed(Summarisation(), f"Here it is:\n```json\n{text}\n```", self.RECORD).startswith("Basel closes")

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("Basel closes the bridge.", "(not_json)"),
            ("[]", "(no_summary)"),
            ('[{"denser_summary": 3}]', "(no_summary)"),
            (steps("In Basel the bridge of Zurich closes."), "(invented_entity)"),
            (steps("Basel closes the bridge for 19 months."), "(invented_entity)"),
            (steps(SOURCE + " And more."), "(not_shorter)"),
        ],
    )
    def test_what_is_no_summary_is_dropped(self, text: str, why: str) -> None:
        assert parsed(Summarisation(), text, self.RECORD) == why

    def test_entities_are_names_within_sentences_and_numbers(self) -> None:
        assert entities("Yesterday Anna Keller's team left. They paid 4.5 million to Basel.") == {
            "anna", "keller", "basel", "4.5",
        }  # fmt: skip

    def test_figures(self) -> None:
        assert rouge_l("the cat on a mat", "The cat sat on the mat.") == pytest.approx(2 * 4 / 11)
        assert Summarisation().metrics([("a b", "a b"), ("c", "d")]) == {"rouge_l": 0.5}
        assert Summarisation().correct("Basel closes its bridge", "Basel closes a bridge.")


class TestExtraction:
    SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}}},
        "required": ["name"],
        "additionalProperties": False,
        "$defs": {"tag": {"type": "string"}},
    }
    RECORD = chat_record("Anna, red and blue", '{"name": "Anna", "tags": ["red", "blue"]}')

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            (' {"name": "Anna"}\n', '{"name": "Anna"}'),
            ('```json\n{"name":"Ännå"}\n```', '{"name": "Ännå"}'),
            ('Sure: {"name": "Anna"}. Anything else?', '{"name": "Anna"}'),
            ('{"name": 3}', "(schema)"),
            ('{"name": "Anna", "age": 3}', "(schema)"),
            ('{"name": "Anna", "tags": [1]}', "(schema)"),
            ('{"name": "Anna"', "(not_json)"),
            ('{"name": "Anna"} or {"name": "Eve"}', "(not_json)"),
            ('{"name": NaN}', "(not_json)"),
            ("[" * 100_000, "(not_json)"),
            ("Anna", "(not_json)"),
        ],
    )
    def test_an_answer_is_json_of_the_schema(self, text: str, value: str) -> None:
        assert parsed(Extraction(json_schema=self.SCHEMA), text, self.RECORD) == value

    def test_the_schema_is_asked_for(self) -> None:
        assert json.dumps(self.SCHEMA) in asked(Extraction(json_schema=self.SCHEMA), self.RECORD)

    @pytest.mark.parametrize(
        ("schema", "why"),
        [({"type": "thing"}, "no JSON Schema"), ({"$ref": "https://example.com/a.json"}, "must begin with #")],
    )
    def test_a_bad_schema_is_refused_and_nothing_is_fetched(self, schema: dict[str, Any], why: str) -> None:
        with pytest.raises(ConfigError, match=why):
            Extraction.create({"json_schema": schema})

    def test_values_compare_as_json(self) -> None:
        task = Extraction()
        assert task.correct('{"a": 1.0, "b": [1, 2]}', '{"b": [1, 2], "a": 1}')
        assert not task.correct('{"a": true}', '{"a": 1}')
        assert not task.correct('{"a": [1, 2]}', '{"a": [2, 1]}')
        assert not task.correct("nothing", "nothing")

    def test_figures(self) -> None:
        figures = Extraction(json_schema=self.SCHEMA).metrics(
            [
                ('{"name": "Anna", "tags": ["blue"]}', '{"name": "Anna", "tags": ["red", "blue"]}'),
                ("no idea", '{"name": "Eve"}'),
                ('{"name": "Eve"}', '{"name": "Eve"}'),
            ]
        )
        assert figures == {
            "json_exact_match": pytest.approx(1 / 3),
            "field_f1": pytest.approx(2 * 3 / (3 + 5)),
            "valid_fraction": pytest.approx(2 / 3),
        }


def rows_of(name: str, num_rows: int) -> list[ChatRecord]:
    """Rows of yizhongw/self-instruct's files, whose completions end in a token of their own."""
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()[:num_rows]
    rows = [json.loads(line) for line in lines]
    return [chat_record(row["prompt"], row["completion"].removesuffix("<|endoftext|>").strip()) for row in rows]


@public_data
class TestPublicData:
    """References of public data, as a teacher that knows them would say them."""

    def test_banking77_intents(self) -> None:
        labels = json.loads((DATA / "banking77" / "categories.json").read_text())
        with open(DATA / "banking77" / "test.csv", newline="", encoding="utf-8") as file:
            rows = [chat_record(row["text"], row["category"]) for row in csv.DictReader(file)][::40]
        task = Tasks({"classification": {"labels": labels}}).named("classification")
        said = [f'The intent is "{row.completion.upper()}".' for row in rows]
        assert [task.parse(text, row) for text, row in zip(said, rows, strict=True)] == [row.completion for row in rows]
        figures = task.metrics(list(zip(said, [row.completion for row in rows], strict=True)))
        assert figures == {"label_accuracy": 1.0, "macro_f1": 1.0}

    def test_quoref_answers_stand_in_their_passages(self) -> None:
        rows = rows_of("quoref/what_is_the_answer.jsonl", 200)
        task = QuestionAnswering(passage_pattern=r"(?s)article \?\s+(.+)")
        kept = [row for row in rows if not parsed(task, f"Answer: {row.completion}.", row).startswith("(")]
        assert len(kept) == 199, "one reference of 200 is no span of its passage"
        strangers = zip(rows, rows[100:] + rows[:100], strict=True)
        assert sum(parsed(task, other.completion, row) == "(not_in_passage)" for row, other in strangers) > 180

    def test_paws_pairs(self) -> None:
        rows = rows_of("paws/concatenation.jsonl", 200)
        task = Tasks({"nli": {"labels": ["Yes", "No"]}}).named("nli")
        assert asked(task, rows[0]).endswith("nothing else: Yes, No")
        assert all(task.parse(row.completion.lower() + ".", row) == row.completion for row in rows)
        assert task.metrics([("No", row.completion) for row in rows])["label_accuracy"] == 109 / 200
