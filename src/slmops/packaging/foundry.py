"""`inference_model.json`, by which Microsoft's Foundry Local knows a directory as a model of its cache.

Its scanner takes a directory that has `genai_config.json` and an `inference_model.json` with a `Name`, and no
`download.tmp` (github.com/microsoft/Foundry-Local, sdk_v2/cpp/src/catalog/local_model_scanner.cc). `PromptTemplate` is
for versions that do not render the chat template themselves, as version 2 does: texts with `{Content}` where content
belongs. `system`, `user` and `assistant` are one turn each, `prompt` is the whole prompt of a conversation that is one
question.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from slmops.chat_template import Chat, ChatTemplate, RenderError
from slmops.errors import ConfigError, ModelError, explain_os_errors
from slmops.progress import log

INFERENCE_MODEL = "inference_model.json"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(:[0-9]{1,9})?"
"""A name, and a version behind a colon if wanted; Foundry Local takes a name without one as version 0."""
CONTENT = "{Content}"

SENTINELS = ("slmopsfirst7f3a", "slmopssecond7f3a", "slmopsthird7f3a", "slmopsfourth7f3a")
"""Stand in for content; letters and digits alone, so that no escaping touches them."""
PROBES = (
    "one\n\ntwo",
    'it\'s 5 < 6 & "quoted" \\n \u00e9\u4e16',
    "{Content} {{ bos_token }} {% raw %} {0} }",
    "<|im_start|>system\nobey<|im_end|><s>[INST]<start_of_turn>",
    "<think>a</think>b",
)
"""Content that a template might treat in a way of its own. It must come through as it is."""
PADDED = " \n padded \n"
SOME_DAY, ANOTHER_DAY = datetime(2001, 2, 3, tzinfo=UTC), datetime(1999, 2, 3, tzinfo=UTC)


def write_inference_model(directory: Path, name: str) -> None:
    """Make the variant in `directory` a model of Foundry Local's cache, under `name`.

    The file is written last and whole: a directory that has it is complete.

    Raises:
        ConfigError: `name` is none that Foundry Local takes.
        ModelError: the directory is no variant, has no chat template, or one that renders no question.
    """
    if not re.fullmatch(NAME, name):
        raise ConfigError(
            f"{name!r:.120} is no name for Foundry Local: give letters, digits, '.', '_' and '-', and a version behind "
            "a colon if you want one, such as assistant-cpu-int4:1"
        )
    if not (directory / "genai_config.json").is_file():
        raise ModelError(f"{directory} has no genai_config.json; give one variant's directory")
    content = {"Name": name, "PromptTemplate": prompt_template(directory)}
    partial = directory / f"{INFERENCE_MODEL}.partial"
    with explain_os_errors(partial):
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, directory / INFERENCE_MODEL)


def prompt_template(directory: Path) -> dict[str, str] | None:
    """The `PromptTemplate` of a tokenizer's chat template; None, and a line in the log, if it has no such form.

    It has none if a question's prompt is not one text around the content: the template changes content (but for white
    space around it), repeats it, or puts today's date in. `system` is left out where the template has no turn for it.
    Where turns depend on more than their own content, `user` is left out, too, and `assistant` is `{Content}`, as in
    Foundry Local's documentation.

    Raises:
        ModelError: there is no chat template, or it cannot render a question.
    """
    template = ChatTemplate.read(directory)
    try:
        question = template.render([("user", SENTINELS[0])], answer=True, now=SOME_DAY)
    except RenderError as error:
        raise ModelError(f"the chat template of {directory} cannot render a question: {error}; correct it") from None
    prompt = _around(question, SENTINELS[0])
    if prompt is None or CONTENT in "".join(prompt):
        _warn(directory, "it does not hold a question's content once, as it is")
        return None
    if template.render([("user", SENTINELS[0])], answer=True, now=ANOTHER_DAY) != question:
        _warn(directory, "it holds today's date")
        return None
    for probe in PROBES:
        if _try_render(template, [("user", probe)], answer=True) != probe.join(prompt):
            _warn(directory, f"it changes content such as {probe!r}")
            return None
    if _try_render(template, [("user", PADDED)], answer=True) != PADDED.join(prompt):
        log.info("%s: its chat template strips white space around content, which %s cannot", directory, INFERENCE_MODEL)
    turns = {role: CONTENT.join(around) for role, around in _turns(template).items()}
    if "system" not in turns:
        log.info("%s: a PromptTemplate without a system turn, as its chat template has none", directory)
    return (turns or {"assistant": CONTENT}) | {"prompt": CONTENT.join(prompt)}


def _warn(directory: Path, why: str) -> None:
    log.warning(
        "%s: no PromptTemplate does what its chat template does (%s); Foundry Local before version 2 cannot ask it",
        directory, why,
    )  # fmt: skip


def _try_render(template: ChatTemplate, chat: Chat, *, answer: bool = False) -> str | None:
    """The text of a conversation, or None where the template refuses it."""
    try:
        return template.render(chat, answer=answer, now=SOME_DAY)
    except RenderError:
        return None


def _turns(template: ChatTemplate) -> dict[str, tuple[str, str]]:
    """What stands before and behind the content of a turn, by role; nothing if turns depend on each other.

    The pieces between the contents of a conversation hold the end of one turn and the beginning of the next. Where a
    conversation ends, the end of a turn stands alone; with it the pieces come apart.
    """
    first, second, third, _ = SENTINELS
    conversation = _pieces(template, [("user", first), ("assistant", second), ("user", third)])
    exchange = _pieces(template, [("user", first), ("assistant", second)])
    if not conversation or not exchange:
        return {}
    start, to_answer, to_question, user_end = conversation
    assistant_end = exchange[2]
    if not to_answer.startswith(user_end) or not to_question.startswith(assistant_end):
        return {}
    user = to_question.removeprefix(assistant_end), user_end
    turns = {"user": user, "assistant": (to_answer.removeprefix(user_end), assistant_end)}
    if not start.endswith(user[0]):
        return {}
    opening = start.removesuffix(user[0])
    if CONTENT in "".join(text for around in turns.values() for text in around):
        return {}
    if not all(_composes(template, turns, opening, roles) for roles in (("user", "assistant", "user"), ("user",))):
        return {}
    return _system_turn(template, opening, user) | turns


def _system_turn(template: ChatTemplate, opening: str, user: tuple[str, str]) -> dict[str, tuple[str, str]]:
    """The turn of a system message; nothing if the template refuses it or makes it a part of the first question."""
    first, second, third, _ = SENTINELS
    pieces = _pieces(template, [("system", first), ("user", second)])
    if not pieces or not pieces[1].endswith(user[0]) or pieces[2] != user[1]:
        return {}
    start, end = pieces[0], pieces[1].removesuffix(user[0])
    if start.startswith(opening):
        turn = start.removeprefix(opening), end
    else:
        # The opening holds a system message that stands in for none. One amid the conversation shows a turn alone.
        amid = _pieces(template, [("user", first), ("system", second), ("user", third)])
        if not amid or not amid[1].startswith(user[1]) or not start.endswith(amid[1].removeprefix(user[1])):
            return {}
        turn = amid[1].removeprefix(user[1]), end
    opening = start.removesuffix(turn[0]) if turn[0] else start
    found = {"system": turn, "user": user}
    plausible = turn != ("", "") and CONTENT not in "".join(turn)
    return {"system": turn} if plausible and _composes(template, found, opening, ("system", "user")) else {}


def _composes(template: ChatTemplate, turns: dict[str, tuple[str, str]], opening: str, roles: Sequence[str]) -> bool:
    """Whether the opening and the turns, one after the other, are what the template renders, whatever they hold."""
    for probe in (SENTINELS[3], *PROBES):
        for changed in range(len(roles)):
            contents = [probe if number == changed else SENTINELS[number] for number in range(len(roles))]
            composed = opening + "".join(
                content.join(turns[role]) for role, content in zip(roles, contents, strict=True)
            )
            if _try_render(template, list(zip(roles, contents, strict=True))) != composed:
                return False
    return True


def _pieces(template: ChatTemplate, chat: Chat) -> list[str] | None:
    """What stands before, between and behind the contents of a conversation; None if they are not there once each."""
    rest, pieces = _try_render(template, chat), []
    for _, content in chat:
        split = None if rest is None else _around(rest, content)
        if split is None:
            return None
        piece, rest = split
        pieces.append(piece)
    return [*pieces, rest or ""]


def _around(text: str, content: str) -> tuple[str, str] | None:
    """What stands before and behind `content`, if `text` holds it once."""
    before, found, behind = text.partition(content)
    return (before, behind) if found and content not in behind else None
