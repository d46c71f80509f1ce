"""Kills publishing processes and looks at what they leave: `python -m loramux.registry.crash --kills 1000`.

Why processes and SIGKILL: no handler, no `finally`, no rollback runs; what holds then holds after any crash of a
process (not after a power cut: the system's own caches survive SIGKILL). Each round one process publishes, moves
aliases and deletes while another collects with almost no grace; one kill falls on a chosen step, the next on a random
moment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from loramux.registry.errors import RegistryError
from loramux.registry.store import Registry
from loramux.registry.types import Version

TENANT, ACTOR = "crash", "crash test"
NAMES = ("one", "two", "three")
NUM_CONTENTS = 24
MAX_STEPS = 60  # a publish takes about eight
MAX_DELAY_S = 0.08
GRACE_S = 0.02


@dataclass(frozen=True)
class _File:
    path: str
    sha256: str
    num_bytes: int
    staged: Path


@dataclass(frozen=True)
class _Upload:
    files: tuple[_File, ...]
    digest: str
    num_bytes: int
    base_digest: str | None = None
    method: str = "lora"
    servability: str = "static"
    max_rank: int = 1


@dataclass
class Findings:
    """`problems` must stay empty; the rest says that the kills hit something."""

    kills: int = 0
    acknowledged: int = 0
    with_leftovers: int = 0
    last_steps: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def storm(root: Path, url: str | None, kills: int, seed: int) -> Findings:
    """Kill `kills` publishers; after each one the registry must be whole and go on working."""
    draw = random.Random(seed)
    uploads = _prepare(root / "staged", draw)
    found = Findings()
    with Registry.open(root / "registry", url=url):
        pass  # what is killed is publishing, not making the schema
    for number in range(kills):
        # Every other round the publisher ends itself at this step.
        last_step = draw.randint(1, MAX_STEPS) if number % 2 == 0 else None
        work = partial(_publish_for_ever, root, url, uploads, number + seed, last_step)
        publisher, collector = _start(work), _start(partial(_collect_for_ever, root, url))
        if last_step is None:
            publisher.wait_for_a_line()
            time.sleep(draw.uniform(0.0, MAX_DELAY_S))
            os.kill(publisher.pid, signal.SIGKILL)
        said = publisher.hear(found)
        os.kill(collector.pid, signal.SIGKILL)
        collector.hear(found)
        found.kills += 1
        _judge(root, url, said, uploads[number % len(uploads)], found)
    return found


def _judge(root: Path, url: str | None, said: list[str], upload: _Upload, found: Findings) -> None:
    found.last_steps[said[-1] if said and not said[-1].startswith("{") else "between"] += 1
    with Registry.open(root / "registry", url=url) as registry:
        before = registry.fsck(grace_s=0)
        found.with_leftovers += before.has_leftovers
        if not before.is_clean:
            found.problems.append(f"kill {found.kills}: {before.as_dict()}")
        _check_kept(registry, [json.loads(line) for line in said if line.startswith("{")], found)
        registry.fsck(repair=True, grace_s=0)
        registry.collect(grace_s=0)
        after = registry.fsck(grace_s=0)
        if not after.is_clean or after.has_leftovers:
            found.problems.append(f"kill {found.kills}, after repair: {after.as_dict()}")
        version = _publish(registry, upload, NAMES[0])
        if registry.resolve(f"{TENANT}/{NAMES[0]}", caller=TENANT).id != version.id:
            found.problems.append(f"kill {found.kills}: the next publish did not move its alias")
        registry.folder(version)


def _check_kept(registry: Registry, told: list[dict[str, Any]], found: Findings) -> None:
    """A publish that returned is there, or was deleted later; its number never means something else."""
    found.acknowledged += len(told)
    deleted = {(line["name"], line["version"]) for line in told if line["deleted"]}
    for name in NAMES:
        there = {version.version: version.digest for version in _versions(registry, name)}
        for line in told:
            number = line["version"]
            if line["name"] != name or (number not in there and (name, number) in deleted):
                continue
            if there.get(number) != line["digest"]:
                found.problems.append(f"kill {found.kills}: {line} is now {there.get(number)}")


def _versions(registry: Registry, name: str) -> list[Version]:
    try:
        return registry.versions(f"{TENANT}/{name}", TENANT)
    except RegistryError:
        return []


def _publish_for_ever(
    root: Path,
    url: str | None,
    uploads: Sequence[_Upload],
    seed: int,
    steps: int | None,
    say: Callable[[str], None],
) -> None:
    draw, left = random.Random(seed), steps

    def step(name: str) -> None:
        nonlocal left
        say(name.split()[0])
        if left is not None:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    with Registry.open(root / "registry", url=url, step=step) as registry:
        while True:
            name = draw.choice(NAMES)
            try:
                version = _publish(registry, draw.choice(uploads), name)
            except RegistryError as error:
                if error.code != "collected":
                    raise
                continue
            told = {"name": name, "version": version.version, "digest": version.digest}
            # Said before it is deleted, so that a kill in between cannot look like a loss.
            deleted = draw.random() < 0.3
            say(json.dumps({**told, "deleted": deleted}))
            registry.set_alias(f"{TENANT}/{name}", "stable", version.version, actor=ACTOR)
            if deleted:
                registry.delete(version.ref, ACTOR, force=True)


def _collect_for_ever(root: Path, url: str | None, _: Callable[[str], None]) -> None:
    with Registry.open(root / "registry", url=url) as registry:
        while True:
            registry.collect(grace_s=GRACE_S)
            time.sleep(0.005)


def _publish(registry: Registry, upload: _Upload, name: str) -> Version:
    return registry.publish(upload, tenant=TENANT, name=name, actor=ACTOR)


def _prepare(folder: Path, draw: random.Random) -> list[_Upload]:
    folder.mkdir(parents=True)
    uploads = []
    for number in range(NUM_CONTENTS):
        texts = {"adapter_config.json": b"{}", "adapter_model.safetensors": draw.randbytes(4000)}
        files = []
        for path, data in texts.items():
            staged = folder / f"{number}-{path}"
            staged.write_bytes(data)
            files.append(_File(path, hashlib.sha256(data).hexdigest(), len(data), staged))
        total = sum(file.num_bytes for file in files)
        uploads.append(_Upload(tuple(files), files[-1].sha256, total))
    return uploads


class _Child:
    """A forked process and the lines it says."""

    def __init__(self, pid: int, lines: int):
        self.pid, self.lines = pid, lines

    def wait_for_a_line(self) -> None:
        """Until it publishes: a process killed while it opens the registry proves nothing."""
        select.select([self.lines], [], [])

    def hear(self, found: Findings) -> list[str]:
        with os.fdopen(self.lines, encoding="utf-8") as read:
            text = read.read()
        _, status = os.waitpid(self.pid, 0)
        if not os.WIFSIGNALED(status):
            found.problems.append(f"a process ended by itself: {text[-500:]}")
        complete = text[: text.rfind("\n") + 1]
        return complete.splitlines()


def _start(work: Callable[[Callable[[str], None]], None]) -> _Child:
    lines, end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(end)
        return _Child(pid, lines)
    os.close(lines)
    try:
        work(lambda line: _say(end, line))
    except BaseException as error:
        _say(end, f"failed: {type(error).__name__}: {error}")
    os._exit(1)


def _say(end: int, line: str) -> None:
    os.write(end, f"{line}\n".encode())


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m loramux.registry.crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="an empty PostgreSQL database; without it SQLite is used")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="loramux-crash-") as folder:
        found = storm(Path(folder), given.url, given.kills, given.seed)
    report = {**vars(found), "last_steps": dict(found.last_steps.most_common())}
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
