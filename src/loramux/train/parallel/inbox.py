"""Commands of a run of several processes: the first process hears them, all obey them in the same round."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from loramux.train.joint.commands import Command, Inbox
from loramux.train.parallel.team import Team


class TeamInbox(AbstractContextManager["TeamInbox"]):
    """`inner` is opened and asked in the first process only. A wish to stop travels with the commands."""

    def __init__(self, inner: Inbox, team: Team):
        self.inner = inner
        self.team = team
        self.stays_open = True  # until the first process has said
        self._own: list[Command] = []

    def __enter__(self) -> TeamInbox:
        if self.team.group.is_first and isinstance(self.inner, AbstractContextManager):
            self.inner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.team.group.is_first and isinstance(self.inner, AbstractContextManager):
            self.inner.__exit__(*error)

    def poll(self) -> Sequence[Command]:
        group = self.team.group
        self._own = list(self.inner.poll()) if group.is_first else []
        told = {
            "stop": self.team.wants_stop,
            "commands": [asdict(one) for one in self._own],
            "open": group.is_first and self.inner.stays_open,
        }
        heard = group.exchange(told)
        self.team.is_stopping = any(one["stop"] for one in heard)
        self.stays_open = bool(heard[0]["open"])
        # The first process answers the very objects that it was given.
        return self._own if group.is_first else [Command(**one) for one in heard[0]["commands"]]

    def answered(self, command: Command, problem: str) -> None:
        if self.team.group.is_first:
            self.inner.answered(command, problem)
