"""chat: the conversation itself, of any number of turns."""

from __future__ import annotations

from slmops.records import ChatRecord
from slmops.tasks.interface import Task


class Chat(Task):
    """The teacher is asked the conversation as it stands; its whole answer is learned."""

    def read(self, text: str, record: ChatRecord) -> str:
        return text  # every token of it has the teacher's distribution
