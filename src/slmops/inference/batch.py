"""Streams that decode together: each begins when there is a slot, and ends by itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from slmops.inference.slots import Slots

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(eq=False)
class Stream:
    """A prompt, and what is done with what follows."""

    ids: Sequence[int]
    """Of the prompt, at least one."""
    num_tokens: int
    """That follow at most, at least one."""
    choose: Callable[[NDArray[Any]], int]
    """The next token, given its logits [vocabulary]."""
    take: Callable[[int], object]
    """Is given each token. What it raises ends the whole step."""
    gone: bool = field(default=False, init=False)
    """Nobody wants a further token. Any thread may set it."""
    num_read: int = field(default=0, init=False)
    num_taken: int = field(default=0, init=False)


S = TypeVar("S", bound=Stream)


class Batch(Generic[S]):
    """Not for several threads: one calls all of its methods."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._waiting: deque[S] = deque()
        self._streams: list[S] = []
        self._tokens: list[int] = []
        """The last of each stream."""

    def __bool__(self) -> bool:
        """Whether any stream is left."""
        return bool(self._waiting or self._streams)

    def add(self, stream: S) -> None:
        """Let a stream begin as soon as there is room for it."""
        self._waiting.append(stream)

    def step(self) -> None:
        """Give every stream at work its next token, and read on in the prompt of the next one.

        Raises:
            DataError: a prompt is longer than the model's context.
        """
        if self._streams:
            self._advance(self._slots.step(self._tokens))
        if self._waiting and self._has_room(self._waiting[0]):
            self._read(self._waiting[0])

    def clear(self) -> list[S]:
        """Drop all streams, and return them."""
        dropped = [*self._streams, *self._waiting]
        while self._streams:
            self._leave(0)
        self._waiting.clear()
        return dropped

    def _has_room(self, stream: S) -> bool:
        """Whether there is a slot, and memory for the longest answers of all; for one alone there is."""
        wanted = sum(len(each.ids) + each.num_tokens for each in (*self._streams, stream))
        return not self._streams or (len(self._streams) < self._slots.num_slots and wanted <= self._slots.max_tokens)

    def _advance(self, logits: NDArray[Any]) -> None:
        for number in reversed(range(len(self._streams))):  # the last, who takes the place of one that leaves, was seen
            if (token := self._take(self._streams[number], logits[number])) is None:
                self._leave(number)
            else:
                self._tokens[number] = token

    def _read(self, stream: S) -> None:
        if not stream.gone:
            stream.num_read, logits = self._slots.read(stream.ids, stream.num_read)
            if stream.num_read < len(stream.ids):
                return
            if (token := self._take(stream, logits[-1])) is not None:
                self._slots.join(len(stream.ids))
                self._streams.append(stream)
                self._tokens.append(token)
        self._waiting.popleft()

    def _take(self, stream: S, logits: NDArray[Any]) -> int | None:
        """The next token of a stream; None if it is the last one, or not wanted."""
        if stream.gone:
            return None
        token = stream.choose(logits)
        stream.num_taken += 1
        stream.take(token)
        full = len(stream.ids) + stream.num_taken > self._slots.context_length
        return None if stream.gone or full or stream.num_taken == stream.num_tokens else token

    def _leave(self, number: int) -> None:
        self._slots.leave(number)
        self._streams[number], self._tokens[number] = self._streams[-1], self._tokens[-1]
        self._streams.pop()
        self._tokens.pop()
