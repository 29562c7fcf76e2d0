"""The teacher behind an endpoint, over a real HTTP server that misbehaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from slmops.config import TEACHER_API_KEY, TEACHER_API_KEY_FILE
from slmops.errors import ArtifactError, ConfigError, TransientError, UserError
from slmops.teachers import endpoint
from slmops.teachers.budget import Budget, BudgetExceeded
from slmops.teachers.cache import AnswerCache
from slmops.teachers.connection import read_key, retry_after
from slmops.teachers.endpoint import EndpointTeacher
from slmops.teachers.interface import Answer, Decoding, Failure, Question, question_key
from tests.teachers import misbehaving
from tests.teachers.misbehaving import Reply, Server, completion, error

GREEDY = Decoding(max_new_tokens=64)
KEY = "sk-secret-0123"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint, "BACKOFF_S", 0.01)
    with misbehaving.serving() as server:
        yield server


def question(text: str, seed: int = 0, *before: str) -> Question:
    messages = tuple({"role": "user", "content": turn} for turn in (*before, text))
    return Question(question_key(messages, GREEDY, seed), messages, seed)


def teacher(server: Server, decoding: Decoding = GREEDY, **settings: Any) -> EndpointTeacher:
    defaults: dict[str, Any] = {"url": server.url, "model": "big", "max_in_flight": 8, "max_retries": 2}
    return EndpointTeacher("big", decoding, **(defaults | settings))


def ask(
    asked: EndpointTeacher, texts: Iterable[str], into: dict[str, Answer | Failure] | None = None
) -> dict[str, Answer | Failure]:
    outcomes = {} if into is None else into
    for answered, outcome in asked.answer(question(text) for text in texts):
        outcomes[answered.messages[-1]["content"]] = outcome
    return outcomes


def numbered(count: int) -> Iterator[str]:
    return (f"q{number}" for number in range(count))


def test_each_question_is_asked_once_many_at_a_time_and_not_far_ahead(server: Server) -> None:
    server.delay_s = 0.01
    num_pulled = num_answered = furthest = 0

    def source() -> Iterator[Question]:
        nonlocal num_pulled, furthest
        for number in range(200):
            num_pulled += 1
            furthest = max(furthest, num_pulled - num_answered)
            yield question(f"q{number}")

    for asked, outcome in teacher(server).answer(source()):
        num_answered += 1
        assert isinstance(outcome, Answer)
        assert outcome == Answer(asked.messages[0]["content"].upper(), "stop", "big-v3", 3, 5)
    assert num_answered == 200
    assert set(server.asked.values()) == {1}
    assert 4 < server.most_in_flight <= 8
    assert furthest <= 8 * endpoint.AHEAD
    assert server.bodies[0] == {
        "model": "big",
        "messages": [{"role": "user", "content": "q0"}],
        "max_completion_tokens": 64,
        "max_tokens": 64,
        "temperature": 0.0,
        "top_p": 1.0,
        "repeat_penalty": 1.0,
        "repetition_penalty": 1.0,
    }


PASSING = {
    "reset": misbehaving.RESET,
    "closed in mid-answer": misbehaving.CUT,
    "half a JSON": misbehaving.HALF_JSON,
    "a page in place of JSON": misbehaving.HTML,
    "empty": misbehaving.EMPTY,
    "hangs": misbehaving.HANG,
    "10 MB": misbehaving.BIG,
    "10 MB in chunks": misbehaving.BIG_CHUNKED,
    "429": error(429),
    "429 with Retry-After": error(429, headers={"Retry-After": "0"}),
    "500": error(500),
    "503": Reply(503, body=b"upstream connect error"),
    "a list": Reply(body=b"[]"),
    "no choices": Reply(payload={"model": "big", "choices": []}),
    "no reason to finish": Reply(payload=completion("x", finish_reason=None)),
    "an error with status 200": Reply(payload={"error": {"message": "overloaded"}}),
    "no Unicode": Reply(payload=completion("\ud800")),
}


def test_what_passes_is_asked_again(server: Server) -> None:
    server.script = {name: [reply] for name, reply in PASSING.items()}
    answers = ask(teacher(server, timeout_s=0.5), PASSING)
    assert {name: isinstance(answer, Answer) and answer.text for name, answer in answers.items()} == {
        name: name.upper() for name in PASSING
    }
    assert set(server.asked.values()) == {2}


LASTING = {
    "reset": (misbehaving.RESET, "connection_lost", 3),
    "closed in mid-answer": (misbehaving.CUT, "cut_off", 3),
    "half a JSON": (misbehaving.HALF_JSON, "not_json", 3),
    "empty": (misbehaving.EMPTY, "empty", 2),
    "hangs": (misbehaving.HANG, "timeout", 3),
    "10 MB": (misbehaving.BIG, "too_large", 2),
    "10 MB in chunks": (misbehaving.BIG_CHUNKED, "too_large", 2),
    "429": (error(429), "rate_limited", 3),
    "500": (error(500), "server_error", 3),
    "a list": (Reply(body=b"[]"), "wrong_shape", 3),
    "too long": (error(400, "This model's maximum context length is 2048 tokens."), "prompt_too_long", 1),
    "too long, as llama.cpp says": (error(400, "the request exceeds the available context size"), "prompt_too_long", 1),
    "too large": (error(413), "prompt_too_long", 1),
    "filtered": (error(400, "no", code="content_filter"), "content_filter", 1),
    "refused": (error(400, "messages: no such role"), "refused", 1),
}


def test_what_lasts_becomes_a_failure_that_can_be_counted(server: Server) -> None:
    server.script = {name: [reply] * 9 for name, (reply, _, _) in LASTING.items()}
    outcomes = ask(teacher(server, timeout_s=0.5), [*LASTING, "fine"])
    assert isinstance(outcomes.pop("fine"), Answer)
    found = {name: failure.reason for name, failure in outcomes.items() if isinstance(failure, Failure)}
    assert found == {name: reason for name, (_, reason, _) in LASTING.items()}
    for name, (_, _, number) in LASTING.items():
        # What is refused before the first answer is asked in a plainer form, too.
        assert server.asked[name] in ((1, 2) if number == 1 else (number,)), name
    assert "after 3 attempts" in str(outcomes["hangs"])
    assert server.bytes_sent < 4 * misbehaving.BIG_BYTES * 0.8, "what is too large is not read to its end"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            error(401, f"bad key {KEY}"),
            rf"refuses the key \(401\); put a valid one into the file .*\${TEACHER_API_KEY}",
        ),
        (error(403), r"refuses the key \(403\)"),
        (error(404, "no model big"), r"no such model or address \(404\): no model big; check endpoint_url"),
        (error(400, "bad request"), r"refuses what it is asked \(400\): bad request"),
        (error(429, "quota", code="insufficient_quota"), r"no credit left for this key \(429\)"),
        (Reply(302, {}, headers={"Location": "http://elsewhere/v1?a=b"}), r"redirects to http://elsewhere/v1 \(302\)"),
        (Reply(payload=completion("x", model="small-v1")), r"serves another model: 'small-v1'; set endpoint_model"),
    ],
)
def test_what_the_user_must_mend_is_said_at_once(
    server: Server, reply: Reply, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    server.always = lambda _: reply
    started = time.monotonic()
    asked = teacher(server, key=KEY)
    with pytest.raises(UserError, match=message) as raised:
        ask(asked, numbered(1000))
    assert time.monotonic() - started < 2
    assert sum(server.asked.values()) <= 24, "the other questions are not sent after it"
    assert raised.value.exit_code == 2
    everything = f"{raised.value!r}{raised.value.__cause__!r}{caplog.text}{asked!r}{vars(raised.value)}"
    assert KEY not in everything
    assert KEY not in json.dumps(dict(asked.identity))


def test_answers_on_their_way_are_kept_when_the_key_is_withdrawn(server: Server) -> None:
    server.always = lambda body: error(401) if body["messages"][0]["content"] == "q7" else Reply(delay_s=0.2)
    kept: dict[str, Answer | Failure] = {}
    with pytest.raises(UserError, match="wants a key"):
        ask(teacher(server), numbered(100), into=kept)
    assert len(kept) == 7
    assert sum(server.asked.values()) == 8


def test_an_odd_question_does_not_end_a_run_in_which_nothing_else_is_left(server: Server) -> None:
    server.script = {"odd": [error(400, "messages.0: odd is refused")] * 2}
    (outcome,) = ask(teacher(server), ["odd"]).values()
    assert outcome == Failure("refused", "status 400")
    assert server.asked == {"odd": 2, "Say yes.": 1}
    server.script = {"odd": [error(400, "odd")] * 2}
    assert len(ask(teacher(server), ["odd", "fine"])) == 2
    assert "repeat_penalty" in next(body for body in server.bodies if body["messages"][0]["content"] == "fine")


def test_the_server_says_when_to_come_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = {"later": [error(429, headers={"Retry-After": "1"})]}
    order = [
        (q.messages[0]["content"], time.monotonic())
        for q, _ in teacher(server, max_in_flight=1).answer(question(text) for text in ("later", "a", "b", "c"))
    ]
    assert [text for text, _ in order] == ["a", "b", "c", "later"], "who waits holds no slot"
    assert order[-1][1] - order[-2][1] > 0.8
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    values = {"3": 3, "0.5": 0.5, "-1": None, "soon": None, "": None, "86400": 120, "Wed, 21 Oct 2015 07:28:00 GMT": 0}
    assert {value: retry_after({"Retry-After": value}) for value in values} == values
    assert 28 < (retry_after({"Retry-After": date}) or 0) <= 30
    monkeypatch.setattr(endpoint, "BACKOFF_S", 0.5)
    delays = [endpoint._delay(9, None) for _ in range(200)]
    assert 0 <= min(delays) < 5
    assert 25 < max(delays) <= 30


def test_an_endpoint_that_is_down_may_be_asked_later(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        TransientError, match=r"http://127\.0\.0\.1:9/v1 \(big\) does not answer .*answers that came are kept"
    ):
        ask(teacher(server, url="http://127.0.0.1:9/v1"), ["q"])
    monkeypatch.setattr(endpoint, "DOWN_AFTER_S", 0.3)
    answered = iter(range(10**6))
    server.always = lambda _: None if next(answered) < 20 else error(503)
    outcomes: dict[str, Answer | Failure] = {}
    with pytest.raises(TransientError, match="status 503"):
        ask(teacher(server, max_retries=50), numbered(10**6), into=outcomes)
    assert [type(outcome) for outcome in outcomes.values()] == [Answer] * 20


def test_a_budget_stops_cleanly(server: Server) -> None:
    server.delay_s = 0.02
    budget = Budget(max_tokens=8 * 20)
    answers: dict[str, Answer | Failure] = {}
    with pytest.raises(BudgetExceeded, match=r"used up \(\d+ tokens of max_tokens 160\).*not paid for twice"):
        ask(teacher(server, budget=budget), numbered(1000), into=answers)
    assert 20 <= len(answers) < 28
    assert sum(server.asked.values()) == len(answers), "no request was paid for and lost"
    assert budget.num_prompt_tokens + budget.num_tokens == 8 * len(answers)
    exact = Budget(max_cost=8 * 5 / 1e6 + 8 * 3 / 1e6 * 2, prompt_price=2.0, completion_price=1.0)
    assert len(ask(teacher(server, budget=exact), numbered(8))) == 8
    assert not exact.left(), "used up, but no question is left: no error"
    with pytest.raises(ConfigError, match="max_cost 5 needs prices"):
        Budget(max_cost=5)
    server.always = lambda _: Reply(payload=completion("x") | {"usage": None})
    with pytest.raises(UserError, match="does not say how many tokens it used"):
        ask(teacher(server, budget=Budget(max_tokens=5)), ["q"])


@pytest.mark.parametrize(
    ("asked", "served", "same"),
    [
        ("big", "big", True),
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4", "gpt-4o", False),
        ("org/big", "/models/big", True),
        ("big", "org/Big-8B", True),
        ("big", "/models/big.gguf", True),
        ("qwen2", "qwen2.5", False),
        ("big", "small", False),
    ],
)
def test_another_model_than_asked_is_refused(server: Server, asked: str, served: str, same: bool) -> None:
    server.always = lambda _: Reply(payload=completion("x", model=served))
    if same:
        (answer,) = ask(teacher(server, model=asked), ["q"]).values()
        assert isinstance(answer, Answer)
        assert answer.model == served
    else:
        with pytest.raises(UserError, match="serves another model"):
            ask(teacher(server, model=asked), ["q"])


def test_whatever_is_served_may_be_taken_but_must_not_change(server: Server) -> None:
    asked = teacher(server, model="default")
    assert len(ask(asked, ["a", "b"])) == 2
    assert {body["model"] for body in server.bodies} == {"big-v3"}, "it is asked by its name"
    server.script = {"c": [Reply(payload=completion("x", model="big-v4"))]}
    with pytest.raises(UserError, match="changed its model from 'big-v3' to 'big-v4' within a run"):
        ask(asked, ["c"])
    server.models = None
    assert len(ask(teacher(server, model="default"), ["d"])) == 1
    assert server.bodies[-1]["model"] == "default"
    server.models = ("one", "two")
    with pytest.raises(UserError, match=r"it serves 2 models; set endpoint_model to one of one, two"):
        ask(teacher(server, model="default"), ["e"])


def test_the_key_is_sent_to_the_endpoint_and_nowhere_else(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    server.key = KEY
    assert len(ask(teacher(server, key=KEY), ["q"])) == 1
    with pytest.raises(UserError, match="refuses the key"):
        ask(teacher(server, key="another"), ["q"])
    with misbehaving.serving() as other:
        server.script = {"r": [Reply(307, {}, headers={"Location": f"{other.url}/chat/completions"})]}
        with pytest.raises(UserError, match=re.escape(f"redirects to {other.url}")):
            ask(teacher(server, key=KEY), ["r"])
        assert other.headers == []
    assert KEY not in caplog.text
    assert "without encryption" not in caplog.text
    EndpointTeacher("t", GREEDY, url="http://vllm.example:8000/v1", key=KEY)
    assert "the key goes to vllm.example without encryption" in caplog.text


def test_the_way_may_lead_through_a_proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:word@").removesuffix("/v1"))
    assert len(ask(teacher(server, url="http://teacher.example/v1"), ["far"])) == 1
    assert (server.headers[0]["host"], server.headers[0]["proxy-authorization"]) == (
        "teacher.example",
        "Basic bWU6d29yZA==",
    )
    monkeypatch.setenv("no_proxy", ".example")
    with pytest.raises(TransientError, match="does not answer"):
        ask(teacher(server, url="http://teacher.example/v1", max_retries=0), ["far"])


def test_the_key_comes_from_a_secret_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"  {KEY}\n")
    assert read_key({}) is None
    assert read_key({TEACHER_API_KEY: f"{KEY}\n"}) == KEY
    both = {TEACHER_API_KEY_FILE: str(file), TEACHER_API_KEY: "old"}
    assert read_key(both) == KEY
    file.write_text("rotated")
    assert read_key(both) == "rotated"
    for content in ("", " \n", "sk-1\nsk-2", "sk\x00", "schlüssel", "k" * 9000):
        file.write_text(content)
        with pytest.raises(ConfigError, match=r"is empty|is no key") as raised:
            read_key(both)
        assert content.strip() == "" or content.strip() not in str(raised.value)
    with pytest.raises(ArtifactError, match="does not exist"):
        read_key({TEACHER_API_KEY_FILE: str(tmp_path / "absent")})


def test_a_caller_that_stops_or_fails_leaves_nothing_behind(server: Server) -> None:
    server.always = lambda body: misbehaving.HANG if body["messages"][0]["content"] != "q0" else None
    started, threads = time.monotonic(), threading.active_count()
    answers = teacher(server).answer(question(f"q{number}") for number in range(100))
    next(answers)
    answers.close()

    def broken() -> Iterator[Question]:
        yield question("q1")
        raise RuntimeError("no more rows")

    with pytest.raises(RuntimeError, match="no more rows"):
        list(teacher(server).answer(broken()))
    assert time.monotonic() - started < 2
    assert threading.active_count() == threads
    deadline = time.monotonic() + 2
    while server.in_flight and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.in_flight == 0, "requests that nobody waits for are cancelled"


def test_a_caller_that_is_slow_costs_no_answer(server: Server) -> None:
    for _, outcome in teacher(server, timeout_s=1.0).answer(question(f"q{number}") for number in range(15)):
        time.sleep(0.1)
        assert isinstance(outcome, Answer)
    assert set(server.asked.values()) == {1}


OPTIONAL = {"max_tokens", "max_completion_tokens", "seed", "top_p", "top_k"}
STRICT = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
FORBIDDEN = [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "input": 3}]


@pytest.mark.parametrize(
    ("refused", "reply", "sent"),
    [
        ({"max_tokens"}, error(400, STRICT), {"max_completion_tokens", "seed", "top_p", "top_k"}),
        (
            {"max_completion_tokens"},
            error(400, "what is max_completion_tokens?"),
            {"max_tokens", "seed", "top_p", "top_k"},
        ),
        ({"seed"}, Reply(422, {"detail": FORBIDDEN}), {"max_tokens", "max_completion_tokens", "top_p", "top_k"}),
        ({"repeat_penalty"}, error(400, "Unrecognized request argument"), OPTIONAL - {"top_k"}),
        ({"repetition_penalty"}, error(400, "unknown repetition_penalty"), OPTIONAL - {"top_k"}),
    ],
)
def test_servers_that_know_other_parameters_are_asked_without_them(
    server: Server, refused: set[str], reply: Reply, sent: set[str]
) -> None:
    server.always = lambda body: reply if refused & set(body) else None
    sampling = Decoding(64, greedy=False, temperature=0.7, top_p=0.9)
    outcomes = teacher(server, sampling).answer(question(f"q{number}", seed=(1 << 40) + number) for number in range(50))
    assert all(isinstance(outcome, Answer) for _, outcome in outcomes)
    assert set(server.bodies[-1]) & OPTIONAL == sent
    assert server.bodies[-1]["temperature"] == 0.7
    assert sum(server.asked.values()) <= 50 + 2 * 8, "it is found out once"
    seeds = {body["seed"] for body in server.bodies if "seed" in body}
    assert max(seeds) < 1 << 31
    assert len(seeds) >= 8 if "seed" in refused else 50


def test_log_probabilities_are_kept_where_offered(server: Server) -> None:
    tokens = [{"token": "J", "logprob": -0.1, "bytes": [74], "top_logprobs": [{"token": "J", "logprob": -0.1}]}]
    reply = completion("J")
    reply["choices"][0]["logprobs"] = {"content": tokens}
    server.script = {"q": [Reply(payload=reply)]}
    decoding = Decoding(64, top_logprobs=1)
    answers = ask(teacher(server, decoding), ["q", "none offered"])
    expected = ({"token": "J", "logprob": -0.1, "top_logprobs": [{"token": "J", "logprob": -0.1}]},)
    assert isinstance(answers["q"], Answer)
    assert answers["q"].top_logprobs == expected
    assert answers["none offered"] == Answer("NONE OFFERED", "stop", "big-v3", 3, 5)
    assert (server.bodies[0]["logprobs"], server.bodies[0]["top_logprobs"]) == (True, 1)

    legacy = {"tokens": ["J"], "token_logprobs": [-0.1], "top_logprobs": [{"J": -0.1}], "text_offset": [0]}
    choice = {"index": 0, "text": "J", "finish_reason": "stop", "logprobs": legacy}
    server.script = {"x\n\ny": [Reply(payload={"model": "big", "choices": [choice]})]}
    ((_, answer),) = teacher(server, decoding, api="completions").answer([question("y", 0, "x")])
    assert answer == Answer("J", "stop", "big", top_logprobs=expected)
    assert server.bodies[-1]["prompt"] == "x\n\ny"
    assert server.bodies[-1]["logprobs"] == 1

    for status in (400, 500):
        server.always = lambda _, status=status: error(status, "logprobs need logits_all")  # type: ignore[misc]
        with pytest.raises(UserError, match=r"gives no log-probabilities as asked .*; set top_logprobs to 0"):
            ask(teacher(server, decoding), ["q"])


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "<think>\nhm, 2+2\n</think>\n\n4"}, "4"),
        ({"content": "hm, 2+2\n</think>\n\n4"}, "4"),
        ({"content": "4", "reasoning_content": "hm"}, "4"),
        ({"content": "write <think> and </think> around it"}, "write <think> and </think> around it"),
        ({"content": None, "refusal": "I cannot"}, "I cannot"),
    ],
)
def test_the_answer_is_told_from_what_is_thought_aloud(server: Server, message: dict[str, Any], text: str) -> None:
    server.always = lambda _: Reply(payload=completion(None, **message))
    (answer,) = ask(teacher(server), ["q"]).values()
    assert isinstance(answer, Answer)
    assert answer.text == text


def test_an_answer_that_is_cut_off_says_so(server: Server) -> None:
    server.always = lambda _: Reply(payload=completion("<think>and on and on", finish_reason="length"))
    assert ask(teacher(server), ["q"]) == {"q": Answer("", "length", "big-v3", 3, 5)}


RUN = """
import os, sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from slmops.teachers.cache import AnswerCache
from slmops.teachers.endpoint import EndpointTeacher
from tests.teachers.test_endpoint import GREEDY, question
teacher = EndpointTeacher("big", GREEDY, url=sys.argv[1], model="big", max_in_flight=8)
with AnswerCache(Path(sys.argv[2]), {"model": "big"}, GREEDY) as cache:
    missing = (q for q in map(question, (f"q{n}" for n in range(300))) if q.key not in cache)
    for q, answer in teacher.answer(missing):
        cache.put(q.key, answer)
        os.write(1, b".")
"""


def test_a_run_that_is_killed_pays_for_no_answer_twice(server: Server, tmp_path: Path) -> None:
    server.delay_s = 0.02
    command = [sys.executable, "-c", RUN, server.url, str(tmp_path), os.getcwd()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert len(process.stdout.read(100)) == 100
        process.send_signal(signal.SIGKILL)
        num_put = 100 + len(process.stdout.read())
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with AnswerCache(tmp_path, {"model": "big"}, GREEDY) as cache:
        found = [cache.get(question(f"q{number}").key) for number in range(300)]
    assert [answer and answer.text for answer in found] == [f"Q{number}" for number in range(300)]
    twice = sum(count == 2 for count in server.asked.values())
    assert max(server.asked.values()) <= 2
    assert num_put < 300
    assert twice <= 16, "only what was on its way when the process was killed, or came in that moment"
