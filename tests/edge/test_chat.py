"""What a request may hold, and where stop strings cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.edge.chat import DEFAULT_MAX_TOKENS, InvalidRequestError, StopStrings, parse_request

QUESTION = [{"role": "user", "content": "hello"}]


def request(**fields: Any) -> dict[str, Any]:
    return {"model": "slmops", "messages": QUESTION} | fields


def test_the_plain_request() -> None:
    parsed = parse_request(request())
    assert parsed.chat == QUESTION
    assert parsed.token_limit == DEFAULT_MAX_TOKENS


def test_both_names_of_the_limit() -> None:
    assert parse_request(request(max_tokens=7)).token_limit == 7
    assert parse_request(request(max_tokens=7, max_completion_tokens=5)).token_limit == 5


def test_parts_and_the_developer_role() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    assert parse_request(request(messages=messages)).chat == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
    ]


def test_fields_that_change_nothing_are_accepted() -> None:
    parse_request(
        request(user="me", store=False, n=1, presence_penalty=0, logprobs=None, response_format={"type": "text"})
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, None),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "x"}]}, None),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_request(request(**fields))
    assert caught.value.status == 400
    if param:
        assert caught.value.param == param


def test_a_body_that_is_no_object() -> None:
    with pytest.raises(InvalidRequestError, match="JSON object"):
        parse_request([1])


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_cut_the_same_however_the_text_arrives(text: str, stops: list[str], data: st.DataObject) -> None:
    ends = [text.find(stop) for stop in stops if stop in text]
    cutter, sent, position = StopStrings(stops), "", 0
    while position < len(text) and not cutter.found:
        size = data.draw(st.integers(1, 5))
        sent += cutter.feed(text[position : position + size])
        position += size
    sent += cutter.rest()
    if ends:
        # Within one piece the first match wins; over several pieces a stop string that is complete earlier does.
        assert cutter.found
        assert text.startswith(sent)
        assert not any(stop in sent for stop in stops)
        assert len(sent) >= min(ends)
        assert any(text[len(sent) :].startswith(stop) for stop in stops)
    else:
        assert sent == text
