"""chat: the conversation itself, of any number of turns."""

from __future__ import annotations

from slmops.tasks.interface import Task


class Chat(Task):
    """The teacher is asked the conversation as it stands; its whole answer is learned."""
