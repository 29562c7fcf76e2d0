"""Teachers that run in this process: what an answer is depends on the question alone, not on how it was found."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slmops import torch_models
from slmops.errors import ConfigError, ModelError
from slmops.records import Message, read_records
from slmops.teachers import decoding as engine
from slmops.teachers.choosing import choose
from slmops.teachers.genai_teacher import GenAITeacher
from slmops.teachers.interface import Answer, Decoding, Failure, Question, Teacher, question_key
from slmops.teachers.packed import NotPackable, PackedModel
from slmops.teachers.transformers_teacher import TransformersTeacher
from slmops.teachers.vllm_teacher import VLLMTeacher
from slmops.training.batches import encode, retokenizes
from tests.teachers import vllm_double

GREEDY = Decoding(max_new_tokens=16)
SAMPLED = Decoding(max_new_tokens=16, greedy=False, temperature=1.5, top_p=0.95)


def questions(rows: Path, count: int, drafts: Sequence[str] = (), decoding: Decoding = GREEDY) -> list[Question]:
    asked = []
    for number, record in enumerate(read_records(rows)[:count]):
        draft = drafts[number % len(drafts)] if drafts else ""
        draft = record.completion if draft == "right" else draft
        asked.append(Question(question_key(record.prompt, decoding, number), tuple(record.prompt), number, draft))
    return asked


def answers(teacher: Teacher, asked: Sequence[Question]) -> list[Answer]:
    """In the order of the questions."""
    found = {question.key: answer for question, answer in teacher.answer(iter(asked))}
    assert len(found) == len(asked)
    assert all(isinstance(answer, Answer) for answer in found.values()), found
    return [found[question.key] for question in asked]  # type: ignore[misc]


def transformers(directory: Path, decoding: Decoding = GREEDY, batch_size: int = 8) -> TransformersTeacher:
    return TransformersTeacher("t", decoding, directory=directory, batch_size=batch_size, dtype="float32")


def generated(directory: Path, asked: Sequence[Question]) -> list[list[int]]:
    """What transformers' own generate answers, one by one."""
    tokenizer = torch_models.load_tokenizer(directory)
    model: Any = torch_models.load_model(directory, dtype=torch.float32, device=torch.device("cpu"))
    found = []
    for question in asked:
        ids = torch.tensor([encode(tokenizer, [dict(m) for m in question.messages], to_answer=True)])
        output = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        found.append(output[0, ids.shape[1] :].tolist())
    return found


def test_greedy_answers_are_those_of_generate_whatever_the_batch(tiny_teacher: Path, train_rows: Path) -> None:
    asked = questions(train_rows, 24)
    expected = generated(tiny_teacher, asked)
    for batch_size in (1, 5, 64):
        found = answers(transformers(tiny_teacher, batch_size=batch_size), asked)
        assert [list(answer.token_ids) for answer in found] == expected
    tokenizer = torch_models.load_tokenizer(tiny_teacher)
    for answer in found:
        assert answer.finish_reason == "stop"
        assert answer.token_ids[-1] == tokenizer.eos_token_id
        assert answer.num_tokens == len(answer.token_ids)
        assert answer.text == tokenizer.decode(list(answer.token_ids[:-1]))


@pytest.mark.parametrize(
    "drafts",
    [("right",), ("off the radio",), ("",), ("right", "", "on tv on tv on tv on tv on tv on tv on tv", "o", "on fan")],
    ids=["right", "wrong", "empty", "mixed"],
)
def test_drafts_change_no_answer(tiny_teacher: Path, train_rows: Path, drafts: tuple[str, ...]) -> None:
    decoding = Decoding(max_new_tokens=16, logits_top_k=4)
    plain = answers(transformers(tiny_teacher, decoding), questions(train_rows, 40))
    drafted = answers(transformers(tiny_teacher, decoding), questions(train_rows, 40, drafts))
    assert [answer.token_ids for answer in drafted] == [answer.token_ids for answer in plain]
    for one, other in zip(drafted, plain, strict=True):
        assert one.logits is not None
        assert other.logits is not None
        np.testing.assert_allclose(one.logits["tail_log_prob"], other.logits["tail_log_prob"], atol=1e-3)


def test_right_drafts_save_passes(tiny_teacher: Path, train_rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0
    forward = PackedModel.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal passes
        passes += 1
        return forward(*arguments, **options)

    monkeypatch.setattr(PackedModel, "forward", counted)
    monkeypatch.setattr(engine.Lookup, "CONFIRMED", 1_000_000)  # guess nothing
    teacher = transformers(tiny_teacher, batch_size=32)
    passes = 0
    answers(teacher, questions(train_rows, 32))
    without, passes = passes, 0
    answers(teacher, questions(train_rows, 32, ("right",)))
    assert 2 * passes <= without


def test_sampling_repeats_with_the_question_not_with_the_batch(tiny_teacher: Path, train_rows: Path) -> None:
    asked = questions(train_rows, 24, decoding=SAMPLED)
    together = answers(transformers(tiny_teacher, SAMPLED, 24), asked)
    alone = answers(transformers(tiny_teacher, SAMPLED, 1), list(reversed(asked)))[::-1]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    drafted = answers(transformers(tiny_teacher, SAMPLED, 24), questions(train_rows, 24, ("right",), SAMPLED))
    assert [answer.text for answer in together] == [answer.text for answer in drafted]
    seeded = [Question(question.key, question.messages, question.seed + 1000) for question in asked]
    assert [a.text for a in answers(transformers(tiny_teacher, SAMPLED, 24), seeded)] != [a.text for a in together]


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_samples_follow_the_distribution(top_p: float) -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    decoding = Decoding(1, greedy=False, top_p=top_p)
    drawn = choose(probabilities.log().expand(4000, 4), decoding, range(4000), [0] * 4000)
    shares = np.bincount(drawn, minlength=4) / 4000
    # 0.5 + 0.25 pass 0.7, so the nucleus is the first two.
    expected = np.array([0.5, 0.25, 0.15, 0.1] if top_p == 1.0 else [2 / 3, 1 / 3, 0, 0])
    np.testing.assert_allclose(shares, expected, atol=0.03)


def test_a_nucleus_of_many_tokens_is_found_whole() -> None:
    logits = torch.zeros(500, 1000)  # 950 of 1,000 equally likely tokens, more than are tried first
    drawn = choose(logits, Decoding(1, greedy=False, top_p=0.95), range(500), [0] * 500)
    assert len(set(drawn)) > 300


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kept_logits_are_those_of_a_plain_pass(tiny_teacher: Path, train_rows: Path, temperature: float) -> None:
    decoding = Decoding(max_new_tokens=16, logits_top_k=8, logits_temperature=temperature)
    asked = questions(train_rows, 12, ("right", ""))
    tokenizer = torch_models.load_tokenizer(tiny_teacher)
    model: Any = torch_models.load_model(tiny_teacher, dtype=torch.float32, device=torch.device("cpu"))
    for question, answer in zip(asked, answers(transformers(tiny_teacher, decoding), asked), strict=True):
        prompt = encode(tokenizer, [dict(message) for message in question.messages], to_answer=True)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer.token_ids]])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / temperature, -1)
        top, ids = expected.topk(8, -1)
        assert answer.logits is not None
        assert answer.logits["top_ids"][:, 0].tolist() == ids[:, 0].tolist()
        np.testing.assert_allclose(answer.logits["top_log_probs"], top, rtol=2e-3, atol=2e-3)
        tail = expected.scatter(-1, ids, -torch.inf).logsumexp(-1)
        np.testing.assert_allclose(answer.logits["tail_log_prob"], tail, rtol=1e-2, atol=1e-2)


def test_questions_are_taken_as_they_are_needed(tiny_teacher: Path, train_rows: Path) -> None:
    taken = 0

    def endless() -> Iterator[Question]:
        nonlocal taken
        asked = questions(train_rows, 64)
        while True:
            for question in asked:
                taken += 1
                yield question

    found = transformers(tiny_teacher, batch_size=4).answer(endless())
    for _ in range(10):
        next(found)
    assert taken <= 2 * 16 * 4
    found.close()


def test_long_prompts_fail_and_long_answers_are_cut(tiny_teacher: Path, train_rows: Path) -> None:
    teacher = transformers(tiny_teacher)
    short = questions(train_rows, 3)
    endless = Question("e" * 32, ({"role": "user", "content": "fan " * 3 * teacher.context_length},), 0)
    found = {question.key: answer for question, answer in teacher.answer([short[0], endless, *short[1:]])}
    failure = found[endless.key]
    assert isinstance(failure, Failure)
    assert failure.reason == "prompt_too_long"
    assert len(found) == 4
    cut = answers(transformers(tiny_teacher, Decoding(max_new_tokens=2)), short)
    assert {(answer.finish_reason, answer.num_tokens) for answer in cut} == {("length", 2)}


def test_a_beginning_that_all_share_is_read_once(tiny_teacher: Path, train_rows: Path) -> None:
    """Long enough to be kept, and followed by prompts of other beginnings."""
    examples = {"role": "system", "content": "turn on the fan: on fan; " * 12}
    asked = [
        Question(f"{number:032x}", (examples, *question.messages) if number % 9 else question.messages, number)
        for number, question in enumerate(questions(train_rows, 48))
    ]
    found = answers(transformers(tiny_teacher, batch_size=12), asked)
    assert [list(answer.token_ids) for answer in found] == generated(tiny_teacher, asked)


def test_where_memory_runs_out_fewer_are_answered_at_once(
    tiny_teacher: Path, train_rows: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = PackedModel.forward

    def limited(self: PackedModel, first: int, feeds: Sequence[Any], **options: Any) -> Any:
        if first + len(feeds) > 5:
            raise torch.OutOfMemoryError("no memory for a sixth row")
        return forward(self, first, feeds, **options)

    asked = questions(train_rows, 24)
    expected = answers(transformers(tiny_teacher), asked)
    teacher = transformers(tiny_teacher, batch_size=16)
    monkeypatch.setattr(PackedModel, "forward", limited)
    with caplog.at_level("INFO", "slmops"):
        found = answers(teacher, asked)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert "memory ran out; 4 prompts at once" in caplog.text


def test_slots_stay_within_their_memory(tiny_teacher: Path, train_rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One long prompt among short ones is answered beside few of them."""
    asked = questions(train_rows, 40)
    long = Question("f" * 32, ({"role": "user", "content": "turn on the fan " * 20},), 0)
    asked = [*asked[:20], long, *asked[20:]]
    expected = answers(transformers(tiny_teacher), asked)
    teacher = transformers(tiny_teacher, batch_size=32)
    assert teacher._packed is not None
    slots = teacher._packed.slots
    limit = 400 * slots.bytes_per_token
    monkeypatch.setattr("slmops.memory.key_value_bytes", lambda: limit)
    sizes = []
    for _ in teacher.answer(asked):
        sizes.append(slots.block.nbytes)
    # Room is made in steps of 64 tokens.
    assert max(sizes) <= 2 * limit
    assert [a.token_ids for a in answers(teacher, asked)] == [a.token_ids for a in expected]


def test_a_model_that_cannot_be_packed_is_answered_by_its_own_generate(
    tiny_teacher: Path, train_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = Decoding(max_new_tokens=16, logits_top_k=4)
    sampled = Decoding(max_new_tokens=16, greedy=False, temperature=1.5, logits_top_k=4)
    asked = questions(train_rows, 20)
    packed = [answers(transformers(tiny_teacher, d), asked) for d in (decoding, sampled)]

    def refuse(*_: Any) -> None:
        raise NotPackable("has a memory of its own")

    monkeypatch.setattr(PackedModel, "__init__", refuse)
    plain = [answers(transformers(tiny_teacher, d), asked) for d in (decoding, sampled)]
    for one, other in zip(plain, packed, strict=True):
        assert [answer.token_ids for answer in one] == [answer.token_ids for answer in other]
        assert one[0].logits is not None
        assert other[0].logits is not None
        np.testing.assert_allclose(one[0].logits["top_log_probs"], other[0].logits["top_log_probs"], atol=2e-3)


def test_generate_too_answers_fewer_at_once_where_memory_runs_out(
    tiny_teacher: Path, train_rows: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise NotPackable("has a memory of its own")

    monkeypatch.setattr(PackedModel, "__init__", refuse)
    asked = questions(train_rows, 24)
    expected = answers(transformers(tiny_teacher), asked)
    teacher = transformers(tiny_teacher, batch_size=16)
    generate: Any = teacher._model.generate  # type: ignore[union-attr]

    def limited(*, input_ids: torch.Tensor, **options: Any) -> Any:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("no memory for a third row")
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(teacher._model, "generate", limited)
    with caplog.at_level("INFO", "slmops"):
        found = answers(teacher, asked)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert "memory ran out" in caplog.text


@pytest.mark.parametrize("architecture", ["Mistral", "Gemma2", "GPT2", "Mamba"])
def test_other_architectures_are_packed_only_where_that_is_right(architecture: str, tmp_path: Path) -> None:
    """Sliding windows and learned positions are packed; capped attention and recurrence are not."""
    import transformers as hf

    settings: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    if architecture in {"Mistral", "Gemma2"}:
        settings |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}
        settings |= {"sliding_window": 3, "max_position_embeddings": 64}
    if architecture != "Mamba":
        settings["num_attention_heads"] = 4
    torch.manual_seed(0)
    config = getattr(hf, f"{architecture}Config")(**settings)
    model = getattr(hf, f"{'GPT2LMHeadModel' if architecture == 'GPT2' else architecture + 'ForCausalLM'}")(config)
    model.eval()
    if architecture in {"Gemma2", "Mamba"}:
        with pytest.raises(NotPackable):
            PackedModel(model)
        return
    prompts = [[3, 4, 5, 6, 7, 8], [3, 4, 9], [10]]
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=63)[0, len(ids) :].tolist()
        for ids in prompts
    ]
    decoder = engine.Decoder(PackedModel(model), Decoding(12), {63}, max_rows=2, memory_bytes=1 << 30)
    requests = iter([engine.Request(number, ids, (), 0, 12) for number, ids in enumerate(prompts)])
    found = {row.request.number: row.tokens for row in decoder.decode(requests)}
    assert [found[number] for number in range(3)] == expected


def test_answers_that_do_not_survive_as_text_are_told_apart(tiny_teacher: Path, train_rows: Path) -> None:
    teacher = transformers(tiny_teacher)
    (answer,) = answers(teacher, questions(train_rows, 1))
    record = read_records(train_rows)[0]
    row = record.model_copy(
        update={"messages": (*record.messages[:-1], Message(role="assistant", content=answer.text))}
    )
    assert retokenizes(teacher.tokenizer, row, answer.token_ids)
    letters = [*(token for letter in answer.text for token in encode_text(teacher, letter)), answer.token_ids[-1]]
    assert not retokenizes(teacher.tokenizer, row, letters)


def encode_text(teacher: TransformersTeacher, text: str) -> list[int]:
    encoded: Any = teacher.tokenizer(text, add_special_tokens=False)
    return list(encoded["input_ids"])


def test_identity_names_model_and_template(tiny_teacher: Path, tmp_path: Path) -> None:
    before = transformers(tiny_teacher).identity
    changed = shutil.copytree(tiny_teacher, tmp_path / "changed")
    (changed / "slmops.json").unlink()
    template = changed / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    after = transformers(changed).identity
    assert before["tokenizer"] == after["tokenizer"]
    assert before["template"] != after["template"]
    assert before["model"] != after["model"]


def without_template(directory: Path, copy: Path) -> Path:
    shutil.copytree(directory, copy)
    (copy / "slmops.json").unlink(missing_ok=True)
    (copy / "chat_template.jinja").unlink()
    return copy


def test_a_teacher_without_a_chat_template_is_refused(tiny_teacher: Path, tiny_variants: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no chat template; add chat_template\.jinja"):
        transformers(without_template(tiny_teacher, tmp_path / "hf"))
    with pytest.raises(ModelError, match=r"no chat template; add chat_template\.jinja"):
        genai(without_template(tiny_variants / "cpu-int4", tmp_path / "og"))


def genai(directory: Path, decoding: Decoding = GREEDY, batch_size: int = 8) -> GenAITeacher:
    return GenAITeacher("g", decoding, directory=directory, batch_size=batch_size)


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_genai_answers_in_batches_as_one_by_one(tiny_variants: Path, train_rows: Path, decoding: Decoding) -> None:
    asked = questions(train_rows, 16, decoding=decoding)
    together = answers(genai(tiny_variants / "cpu-int4", decoding), asked)
    alone = answers(genai(tiny_variants / "cpu-int4", decoding, 1), list(reversed(asked)))[::-1]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert {answer.finish_reason for answer in together} <= {"stop", "length"}
    assert all(answer.num_tokens == len(answer.token_ids) > 0 for answer in together)


def test_genai_answers_fewer_prompts_at_once_where_memory_is_short(
    tiny_variants: Path, train_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    answer_batch = GenAITeacher._answer_batch

    def counted(self: GenAITeacher, asked: Sequence[Question], prompts: Sequence[list[int]]) -> list[Answer]:
        batches.append(len(asked))
        return answer_batch(self, asked, prompts)

    (question,) = questions(train_rows, 1)
    asked = [replace(question, key=f"{number:032x}") for number in range(5)]
    teacher = genai(tiny_variants / "cpu-int4")
    (expected,) = answers(teacher, asked[:1])
    monkeypatch.setattr(GenAITeacher, "_answer_batch", counted)
    # Four layers, two heads of 32 for keys and as many for values, in float32.
    bytes_per_row = 4 * 2 * 2 * 32 * 4 * (expected.num_prompt_tokens + GREEDY.max_new_tokens)
    monkeypatch.setattr("slmops.memory.key_value_bytes", lambda: int(2.5 * bytes_per_row))
    assert answers(teacher, asked) == [expected] * 5
    assert batches == [2, 2, 1]


def test_genai_keeps_logits_of_what_it_chose(tiny_variants: Path, train_rows: Path) -> None:
    decoding = Decoding(max_new_tokens=4, logits_top_k=8)
    for answer in answers(genai(tiny_variants / "cpu-int4", decoding), questions(train_rows, 6)):
        assert answer.logits is not None
        assert answer.logits["top_ids"][:, 0].tolist() == list(answer.token_ids)
        mass = np.exp(answer.logits["top_log_probs"].astype(np.float64)).sum(-1) + np.exp(
            answer.logits["tail_log_prob"]
        )
        np.testing.assert_allclose(mass, 1.0, atol=5e-3)


def test_vllm_is_asked_in_tokens_and_its_log_probabilities_are_kept(
    tiny_teacher: Path, train_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", vllm_double)
    decoding = Decoding(max_new_tokens=16, logits_top_k=8)
    asked = questions(train_rows, 4)
    found = answers(VLLMTeacher("v", decoding, directory=tiny_teacher, dtype="float32"), asked)
    expected = answers(transformers(tiny_teacher, decoding), asked)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.text, ours.token_ids, ours.finish_reason) == (theirs.text, theirs.token_ids, theirs.finish_reason)
        assert ours.logits is not None
        assert theirs.logits is not None
        np.testing.assert_allclose(ours.logits["top_log_probs"], theirs.logits["top_log_probs"], atol=2e-3)
        np.testing.assert_allclose(ours.logits["tail_log_prob"], theirs.logits["tail_log_prob"], atol=1e-2)


def test_vllm_says_what_it_cannot_do(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="pip install vllm"):
        VLLMTeacher("v", GREEDY, directory=tiny_teacher, dtype="auto")
    hot = Decoding(max_new_tokens=4, logits_top_k=8, logits_temperature=2.0)
    with pytest.raises(ConfigError, match=r"at temperature 1, got logits_temperature=2\.0"):
        VLLMTeacher("v", hot, directory=tiny_teacher, dtype="auto")
