"""A socket in the run's folder: who may write there may ask how the jobs stand, pause, resume, cancel and prioritise.

One JSON line each way: {"do": "list"}, {"do": "show", "job": NAME} or {"do": "pause", "job": NAME}; the answer is
{"ok": true, ...} or {"ok": false, "error": TEXT}. A command is answered when the run has obeyed it, which is between
two rounds; a question at once.

Why a folder of its own around the socket: it is made for its owner alone before the socket is there, so nobody can
connect in between. Paths of sockets are short, so a deep run folder gets one in the system's temporary folder, and
`address` says where.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import socket
import socketserver
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from loramux.errors import LoramuxError
from loramux.train.joint.commands import Command, Inbox, What

CONTROL, SOCKET, ADDRESS = "control", "jobs.sock", "address"
MAX_PATH = 100  # bytes; the system's limit is 104 to 108
MAX_LINE = 65536
ANSWER_SECONDS = 30.0
Question = Callable[[str], dict[str, Any]]


class InUseError(LoramuxError):
    """Another process trains in this folder."""


class _Asked:
    """A command on its way, and who waits for it."""

    def __init__(self, command: Command):
        self.command = command
        self.done = threading.Event()
        self.problem = ""


class Control(contextlib.AbstractContextManager["Control"]):
    """The run's inbox: the socket, and whatever else gives commands (`others`).

    questions: what may be asked beside commands, by its name; each is called with the job's name, or "", on a thread of
    its own. wants_more: whether the run waits for further jobs when all have ended.
    """

    def __init__(
        self,
        folder: Path,
        questions: Mapping[str, Question],
        others: Sequence[Inbox] = (),
        wants_more: bool = False,
    ):
        self.folder = folder / CONTROL
        self.questions = dict(questions)
        self.others = tuple(others)
        self.wants_more = wants_more
        self._asked: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
        self._waiting: list[_Asked] = []
        self._server: socketserver.ThreadingUnixStreamServer | None = None
        self._elsewhere: Path | None = None

    def __enter__(self) -> Control:
        if is_answered(self.folder):
            raise InUseError(
                f"another process trains in {self.folder.parent} now; look with loramux jobs {self.folder.parent}, or "
                "choose another folder"
            )
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        self.folder.mkdir(mode=0o700, parents=True)
        path = self.folder / SOCKET
        if len(os.fsencode(path)) > MAX_PATH:
            self._elsewhere = Path(tempfile.mkdtemp(prefix="loramux-"))
            path = self._elsewhere / SOCKET
        self._server = _Server(str(path), _Handler)
        self._server.control = self  # type: ignore[attr-defined]
        (self.folder / ADDRESS).write_text(str(path), encoding="utf-8")
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        for asked in [*self._waiting, *self._drain()]:
            asked.problem = "the run has ended"
            asked.done.set()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._elsewhere is not None:
            shutil.rmtree(self._elsewhere, ignore_errors=True)

    # --- The inbox, on the training thread --------------------------------------------------------

    @property
    def stays_open(self) -> bool:
        return self.wants_more or any(other.stays_open for other in self.others)

    def poll(self) -> list[Command]:
        found = [command for other in self.others for command in other.poll()]
        self._waiting += self._drain()
        return found + [asked.command for asked in self._waiting]

    def answered(self, command: Command, problem: str) -> None:
        for other in self.others:
            other.answered(command, problem)
        for asked in [one for one in self._waiting if one.command is command]:
            asked.problem = problem
            asked.done.set()
            self._waiting.remove(asked)

    def _drain(self) -> list[_Asked]:
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._asked.get_nowait())
        return found

    # --- The socket, on threads of its own --------------------------------------------------------

    def answer(self, line: bytes) -> dict[str, Any]:
        """What a request gets back."""
        try:
            request = json.loads(line)
            what = request["do"]
        except (ValueError, KeyError, TypeError):
            return _refused('a request is one JSON line such as {"do": "list"}')
        named = request.get("job")
        if isinstance(what, str) and what in self.questions and isinstance(named, str | None):
            try:
                return {"ok": True, **self.questions[what](named or "")}
            except LoramuxError as error:
                return _refused(str(error))
        allowed = [each for each in get_args(What) if each != "add"]
        if what not in allowed or not isinstance(named, str):
            known = ", ".join([*self.questions, *allowed])
            return _refused(f"'do' must be one of {known}, with 'job' a name")
        value = request.get("value")
        if what == "priority" and (not isinstance(value, int) or isinstance(value, bool)):
            return _refused("'value' must be a whole number: the new priority")
        asked = _Asked(Command(what, named, value))
        self._asked.put(asked)
        if not asked.done.wait(ANSWER_SECONDS):
            return {"ok": True, "note": "a round is still running; the command comes after it"}
        return _refused(asked.problem) if asked.problem else {"ok": True}


def is_answered(folder: Path) -> bool:
    """Whether a process listens behind this control folder; one that was killed leaves the folder only."""
    try:
        address = (folder / ADDRESS).read_text(encoding="utf-8")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(address)
    except (OSError, ValueError):
        return False
    return True


def _refused(text: str) -> dict[str, Any]:
    return {"ok": False, "error": text}


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


class _Handler(socketserver.StreamRequestHandler):
    timeout = ANSWER_SECONDS

    def handle(self) -> None:
        line = self.rfile.readline(MAX_LINE)
        if line:
            answer: dict[str, Any] = self.server.control.answer(line)  # type: ignore[attr-defined]
            self.wfile.write(json.dumps(answer).encode() + b"\n")
