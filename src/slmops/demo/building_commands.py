"""The demo's data set: requests to a building's devices in plain English, and the JSON command that each one means.

A seeded grammar makes the rows, so the data set needs no download and has no licence but this project's. Test requests
come from sentence patterns that no training or validation request has.
"""

from __future__ import annotations

import filecmp
import json
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from slmops.demo import building_phrases as phrases
from slmops.errors import ConfigError
from slmops.records import write_jsonl

Split = Literal["train", "validation", "test"]
Value = int | str | None

KINDS = {
    "plain": 0.28,
    "polite": 0.2,
    "chatty": 0.14,
    "correction": 0.13,
    "typo": 0.08,
    "out_of_scope": 0.17,
}
"""Share of each kind of request in every split."""

SHARES: dict[Split, float] = {"train": 0.83, "validation": 0.05, "test": 0.12}

NO_COMMAND = '{"device":null,"room":null,"action":"none","value":null}'

MAX_TRIES = 500
"""Draws for one new row before the grammar counts as used up."""

ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
DOUBLING = {"set", "put", "get", "shut", "dim", "stop", "run"}
NEIGHBOURS = {
    "a": "s",
    "e": "r",
    "i": "o",
    "o": "p",
    "t": "r",
    "n": "m",
    "r": "t",
    "s": "d",
    "h": "j",
    "l": "k",
    "c": "v",
}
NEVER_MISSPELT = {"lock", "unlock", "locked", "unlocked"}


class Intent(NamedTuple):
    """What can be asked of a device, and how its value is said ("" for none)."""

    device: str
    action: str
    unit: str


@dataclass(frozen=True)
class Command:
    """What a request means."""

    device: str
    room: str | None
    action: str
    value: Value = None

    def json(self) -> str:
        """Keys in a fixed order, no white space: the same command is the same text."""
        fields = {"device": self.device, "room": self.room, "action": self.action, "value": self.value}
        return json.dumps(fields, separators=(",", ":"))


def make_rows(num_rows: int = 6000, seed: int = 0) -> list[dict[str, Any]]:
    """`num_rows` rows of `request`, `command`, `split` and `kind`, in a shuffled order; no request occurs twice.

    Raises:
        ConfigError: the grammar does not make that many different requests.
    """
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for split, count in _apportion(num_rows, SHARES).items():
        grammar = _Grammar(random.Random(f"{seed}/{split}"), side=int(split == "test"))
        for kind, num_of_kind in _apportion(count, KINDS).items():
            for _ in range(num_of_kind):
                request, command = grammar.new_row(kind, seen)
                rows.append({"request": request, "command": command, "split": split, "kind": kind})
    random.Random(f"{seed}/order").shuffle(rows)
    return rows


def write(path: Path, num_rows: int = 6000, seed: int = 0) -> Path:
    """Write `make_rows` as JSONL; `path` holds all rows or does not exist. The same rows leave it untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write_jsonl(partial, make_rows(num_rows, seed))
    if path.exists() and filecmp.cmp(partial, path, shallow=False):
        partial.unlink()  # a new time of change would void the cached steps of a run that was killed
    else:
        os.replace(partial, path)
    return path


def patterns(split: Split) -> set[str]:
    """Every sentence pattern that rows of `split` are made of, its other slots still open."""
    side = int(split == "test")
    frames = [
        frame for table in (phrases.FRAMES, phrases.CORRECTIONS) for sides in table.values() for frame in sides[side]
    ]
    verbs = [verb for *_, train, test in phrases.PHRASES for verb in (train, test)[side]]
    found = {re.sub(r"\{(vp0?|ving0?|wrong)\}", verb, frame) for frame in frames for verb in verbs}
    return found | set(phrases.OUT_OF_SCOPE[side])


def _words(names: str) -> list[str]:
    return [name.replace("_", " ") for name in names.split()]


def _intents() -> dict[Intent, tuple[list[str], list[str]]]:
    """The verb phrases of each intent, for training and for test."""
    found: dict[Intent, tuple[list[str], list[str]]] = {}
    for action, devices, unit, train, test in phrases.PHRASES:
        for device in _words(devices):
            verbs = found.setdefault(Intent(device, action, unit), ([], []))
            verbs[0].extend(train)
            verbs[1].extend(test)
    return found


INTENTS = _intents()
PLACES = {device: _words(rooms) for device, rooms in phrases.PLACES.items()}


class _Grammar:
    """Draws rows from the patterns of one side: 0 for training and validation, 1 for test."""

    def __init__(self, chance: random.Random, side: int) -> None:
        self.chance, self.side = chance, side
        self.makers: Mapping[str, Callable[[], tuple[str, str]]] = {
            "correction": self._correction,
            "typo": self._typo,
            "out_of_scope": self._out_of_scope,
        }

        self.pairs = [
            (wrong, right, verbs, rooms)
            for wrong in INTENTS
            for right in INTENTS
            if wrong.device != right.device and wrong[1:] == right[1:] and not wrong.unit
            if (verbs := [verb for verb in INTENTS[wrong][side] if verb in INTENTS[right][side]])
            if (rooms := [room for room in PLACES[wrong.device] if room in PLACES[right.device]])
        ]

    def new_row(self, kind: str, seen: set[str]) -> tuple[str, str]:
        """A request that is not in `seen` (but for case and punctuation), and its command."""
        for _ in range(MAX_TRIES):
            request, command = self.makers[kind]() if kind in self.makers else self._direct(kind)
            key = re.sub(r"[^a-z0-9% ]", "", request.lower())
            if key not in seen:
                seen.add(key)
                return self._punctuate(request), command
        raise ConfigError(f"the grammar has no more different requests of kind {kind}; set num_rows lower")

    def _direct(self, kind: str) -> tuple[str, str]:
        frame = self.chance.choice(phrases.FRAMES[kind][self.side])
        intent = self._intent(lambda intent: "{state}" not in frame or _has_state(intent))
        command = Command(intent.device, self._room(intent.device), intent.action, self._value(intent.unit))
        return self._say(frame, intent, command), command.json()

    def _typo(self) -> tuple[str, str]:
        request, command = self._direct(self.chance.choice(("plain", "polite", "chatty")))
        return self._misspell(request), command

    def _out_of_scope(self) -> tuple[str, str]:
        device = self.chance.choice([device for device in phrases.DEVICES if device != "blinds"])
        command = Command(device, self._room(device), "none")
        first, second = self.chance.sample(range(2, 13), 2)
        slots = {"n": str(first), "n2": str(second)}
        for slot, words in phrases.TOPICS.items():
            slots[slot] = self.chance.choice(words)
        sentence = self.chance.choice(phrases.OUT_OF_SCOPE[self.side])
        return self._say(sentence, Intent(device, "none", ""), command, slots), NO_COMMAND

    def _correction(self) -> tuple[str, str]:
        corrected = self.chance.choice(list(phrases.CORRECTIONS))
        frame = self.chance.choice(phrases.CORRECTIONS[corrected][self.side])
        makers = {
            "room": self._wrong_room,
            "value": self._wrong_value,
            "action": self._wrong_action,
            "device": self._wrong_device,
        }
        return makers[corrected](frame)

    def _wrong_room(self, frame: str) -> tuple[str, str]:
        intent = self._intent()
        room, wrong_room = self.chance.sample(PLACES[intent.device], 2)
        right = Command(intent.device, room, intent.action, self._value(intent.unit))
        name = self.chance.choice(phrases.ROOMS[room])
        one = "ones" if intent.device == "blinds" else "one"
        slots = {"room2": name, "in_room2": _in_room(name), "one": one}
        return self._say(frame, intent, replace(right, room=wrong_room), slots), right.json()

    def _wrong_value(self, frame: str) -> tuple[str, str]:
        intent = self._intent(lambda intent: intent.unit != "")
        right = Command(intent.device, self._room(intent.device), intent.action, self._value(intent.unit))
        wrong = right
        while wrong == right:
            wrong = replace(right, value=self._value(intent.unit))
        slots = {"v2": self._say_value(right.value, intent.unit)}
        return self._say(frame, intent, wrong, slots), right.json()

    def _wrong_action(self, frame: str) -> tuple[str, str]:
        """ "Turn it on" is English and "turn on it" is not, so a verb phrase with a particle in front is no answer."""
        intent = self._intent(lambda intent: any(map(_takes_pronoun, INTENTS[intent][self.side])))
        wrong_intent = self._intent(lambda wrong: wrong.device == intent.device and wrong != intent)
        right = Command(intent.device, self._room(intent.device), intent.action, self._value(intent.unit))
        wrong = Command(intent.device, right.room, wrong_intent.action, self._value(wrong_intent.unit))
        verb = self.chance.choice([verb for verb in INTENTS[intent][self.side] if _takes_pronoun(verb)])
        pronoun = "them" if intent.device == "blinds" else "it"
        it = verb.replace("{x}", pronoun).replace("{v}", self._say_value(right.value, intent.unit))
        return self._say(frame, wrong_intent, wrong, {"it": it}), right.json()

    def _wrong_device(self, frame: str) -> tuple[str, str]:
        """Another device of the same room that the same words fit."""
        wrong_intent, intent, verbs, rooms = self.chance.choice(self.pairs)
        room = self.chance.choice(rooms)
        right = Command(intent.device, room, intent.action)
        slots = {"device2": self.chance.choice(phrases.DEVICES[intent.device])}
        return self._say(frame, wrong_intent, replace(right, device=wrong_intent.device), slots, verbs), right.json()

    def _intent(self, fits: Callable[[Intent], bool] = lambda _: True) -> Intent:
        return self.chance.choice([intent for intent in INTENTS if fits(intent)])

    def _room(self, device: str) -> str:
        return self.chance.choice(PLACES[device])

    def _value(self, unit: str) -> Value:
        return self.chance.choice(phrases.VALUES[unit]) if unit else None

    def _say_value(self, value: Value, unit: str) -> str:
        if not isinstance(value, int):
            return value or ""
        number = self.chance.choice((str(value), str(value), _spell(value)))
        if unit == "percent":
            return f"{value}%" if self.chance.random() < 0.4 else f"{number} percent"
        if unit.startswith("degrees"):
            return f"{number} degree{'s' * (value != 1)}"
        return f"{number} minutes" if unit == "minutes" else number

    def _say(
        self,
        frame: str,
        intent: Intent,
        command: Command,
        slots: Mapping[str, str] | None = None,
        verbs: Sequence[str] = (),
    ) -> str:
        """Fill the slots of `frame` with the words of `command`."""
        device = self.chance.choice(phrases.DEVICES[command.device])
        room = self.chance.choice(phrases.ROOMS[command.room]) if command.room else ""
        bare = f"the {device}"
        full = self.chance.choice((f"the {room} {device}", f"{bare} {_in_room(room)}")) if room else bare
        verb = self.chance.choice(verbs or INTENTS.get(intent, ([""], [""]))[self.side])
        value = self._say_value(command.value, intent.unit)
        plural = device in phrases.PLURAL
        filled = {
            "vp": verb.replace("{x}", full),
            "vp0": verb.replace("{x}", bare),
            "ving": _gerund(verb).replace("{x}", full),
            "ving0": _gerund(verb).replace("{x}", bare),
            "wrong": verb.replace("{x}", full),
            "state": self.chance.choice(phrases.STATES.get(intent.action, ("",))),
            "x": full,
            "room": room,
            "in_room": _in_room(room),
            "device": device,
            "device1": device,
            "is": "are" if plural else "is",
            "needs": "need" if plural else "needs",
            "has": "have" if plural else "has",
        } | dict(slots or {})
        text = re.sub(r"\{(\w+)\}", lambda slot: filled[slot[1]], frame).replace("{v}", value)
        return re.sub(r"\ba (?=[aeio])", "an ", text)

    def _punctuate(self, request: str) -> str:
        if request[-1].isalnum():
            request += self.chance.choices(("", ".", "!"), (60, 30, 10))[0]
        elif request.endswith("?") and self.chance.random() < 0.4:
            request = request[:-1]
        return request[0].upper() + request[1:] if self.chance.random() < 0.5 else request

    def _misspell(self, request: str) -> str:
        """One or two slips of a typing finger, never on a first letter, nor where another command would come out."""
        words = request.split(" ")
        fit = [i for i, word in enumerate(words) if word.isalpha() and len(word) > 3 and word not in NEVER_MISSPELT]
        for i in self.chance.sample(fit, min(len(fit), self.chance.choice((1, 1, 2)))):
            words[i] = self._slip(words[i])
        return " ".join(words)

    def _slip(self, word: str) -> str:
        at = self.chance.randrange(1, len(word) - 1)
        letter, after = word[at], word[at + 1]
        slips = [
            word[:at] + word[at + 1 :],
            word[:at] + letter + word[at:],
            word[:at] + after + letter + word[at + 2 :],
        ]
        slips.append(word[:at] + NEIGHBOURS.get(letter, letter * 2) + word[at + 1 :])
        return self.chance.choice([slip for slip in slips if slip != word])


def _has_state(intent: Intent) -> bool:
    return intent.action in phrases.STATES and intent.unit in ("", "percent", "degrees")


def _takes_pronoun(verb: str) -> bool:
    return re.search(r"\b(on|off|up|down) \{x\}", verb) is None


def _in_room(room: str) -> str:
    return f"on the {room}" if room in ("patio", "terrace") else f"in the {room}"


def _gerund(verb: str) -> str:
    first, _, rest = verb.partition(" ")
    stem = first + first[-1] if first in DOUBLING else first.removesuffix("e")
    return f"{stem}ing {rest}"


def _spell(number: int) -> str:
    """A number from 0 to 99 in words."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return f"{TENS[tens]}-{ONES[ones]}" if ones else TENS[tens]


def _apportion(count: int, shares: Mapping[Any, float]) -> dict[Any, int]:
    """Whole numbers in proportion to `shares` that add up to `count`."""
    parts, total, given = {}, 0.0, 0
    for name, share in shares.items():
        total += share
        parts[name] = round(count * min(total, 1.0)) - given
        given += parts[name]
    return parts
