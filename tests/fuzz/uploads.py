"""Hostile uploads by the thousand: `python -m fuzz.uploads --archives 2000 --mutations 50000` with tests/ on the path.

Of every upload: refused with an UploadError or taken whole, in under a second, nothing left behind and nothing
changed outside the staging folder. Of all together: the memory of the process. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.hostile_archives import attacks, mutations
from fuzz.hostile_names import hostile_names
from fuzz.mutations import mutated_adapters
from fuzz.parcels import BASE, parcel
from loramux.registry.checks import (
    Source,
    UploadError,
    check_upload,
    from_archive,
    from_folder,
    from_members,
)

MOST_SECONDS = 1.0  # of processor time, for one upload


@dataclass
class Tally:
    """What came of one kind of upload."""

    codes: Counter[str] = field(default_factory=Counter)
    taken: list[str] = field(default_factory=list)  # digests of those that were sound
    faults: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "uploads": sum(self.codes.values()),
            "codes": dict(self.codes.most_common()),
            "slowest_s": round(self.slowest_s, 3),
            "faults": self.faults[:20],
        }


def try_all(uploads: Iterable[tuple[str, Source | BaseException]], staging: Path) -> Tally:
    """Check every upload in `staging`."""
    tally = Tally()
    for label, source in uploads:
        start = time.process_time()
        try:
            if isinstance(source, UploadError):
                raise source
            assert not isinstance(source, BaseException)
            with check_upload(source, BASE, staging=staging) as checked:
                tally.codes["taken"] += 1
                tally.taken.append(checked.digest)
        except UploadError as error:
            tally.codes[error.code] += 1
            if str(staging) in str(error):
                tally.faults.append(f"{label}: the message shows where copies lie")
            if not str(error).isprintable():
                tally.faults.append(f"{label}: the message holds control codes: {str(error)!a}")
        except Exception as error:  # what is looked for: anything but the one error is a fault
            tally.codes["fault"] += 1
            tally.faults.append(f"{label}: {type(error).__name__}: {error}"[:300])
        seconds = time.process_time() - start
        tally.slowest_s = max(tally.slowest_s, seconds)
        if seconds > MOST_SECONDS:
            tally.faults.append(f"{label}: {seconds:.1f} s")
    if left := sorted(os.listdir(staging)):
        tally.faults.append(f"left behind: {left[:5]}")
    return tally


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below `root`: kind, size and time of change."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            info = path.lstat()
            found[str(path.relative_to(root))] = (info.st_mode, info.st_size, info.st_mtime_ns)
    return found


def links(root: Path) -> Iterator[tuple[str, Source]]:
    """Folders in which a file or the folder around it is a link, a pipe or missing; all must be refused."""
    outside = root / "outside"
    outside.mkdir(parents=True)
    for name, data in parcel().items():
        (outside / name).write_bytes(data)
    (outside / "secret.json").write_text('{"r": 1}')
    targets = (
        "/etc/passwd",
        "../outside/secret.json",
        str(outside),
        "/dev/zero",
        "nowhere",
        ".",
        "/proc/self/mem",
    )
    number = 0
    for name in parcel():
        for target in (*targets, f"../outside/{name}", str(outside / name), name):
            for extra in (None, "link.json", "README.md", "experts", "loramux.json"):
                number += 1
                folder = root / f"upload{number}"
                folder.mkdir()
                for own, data in parcel().items():
                    if own != name or extra is not None:
                        (folder / own).write_bytes(data)
                (folder / (extra or name)).symlink_to(target)
                if extra != "README.md":  # left out unread
                    yield f"link {extra or name} -> {target}", from_folder(folder)
        folder = root / f"pipe-{name}"
        folder.mkdir()
        for own, data in parcel().items():
            if own != name:
                (folder / own).write_bytes(data)
        os.mkfifo(folder / name)
        yield f"pipe {name}", from_folder(folder)


def run(archives: int, number: int, names: int, seed: int, root: Path) -> dict[str, Any]:
    """Everything, in a root of its own whose other contents must stay as they are."""
    staging, canary = root / "staging", root / "canary"
    for path in (staging, canary):
        path.mkdir()
    (canary / "file").write_text("as it was")
    crafted = list(links(root / "links"))
    before = snapshot(root)
    os.chdir(canary)
    tallies = {
        "links": try_all(crafted, staging),
        "crafted archives": try_all(((a.label, from_archive(a.data)) for a in attacks()), staging),
        "mutated archives": try_all(
            (
                (f"archive {i}", from_archive(a.data))
                for i, a in enumerate(mutations(archives, seed))
            ),
            staging,
        ),
        "members with hostile names": try_all(
            (
                (f"member {name[:40]!a}", from_members({**parcel(), name: b"x"}))
                for name in hostile_names(names, seed)
            ),
            staging,
        ),
        "mutated adapters": try_all(
            (
                (f"adapter {i}", from_members(files))
                for i, files in enumerate(mutated_adapters(number, seed))
            ),
            staging,
        ),
    }
    for kind in ("links", "crafted archives"):
        if tallies[kind].taken:
            tallies[kind].faults.append(f"{len(tallies[kind].taken)} were taken")
    after = snapshot(root)
    changed = sorted(
        path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
    )
    changed = [path for path in changed if path != "staging"]
    return {
        **{kind: tally.as_json() for kind, tally in tallies.items()},
        "changed outside": changed[:20],
        "max_rss_mib": most_memory_mib(),
        "torch": "torch" in sys.modules,
        "faults": sum(len(tally.faults) for tally in tallies.values()) + len(changed),
    }


def most_memory_mib() -> int:
    """The most this process ever held. Not ru_maxrss, which a child takes over from whoever started it."""
    text = Path("/proc/self/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) // 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--archives", type=int, default=2000, help="mutated archives, beside the crafted ones"
    )
    parser.add_argument("--mutations", type=int, default=50_000, help="mutated adapters")
    parser.add_argument("--names", type=int, default=2000, help="members with hostile names")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        result = run(given.archives, given.mutations, given.names, given.seed, Path(root))
        os.chdir("/")
    print(json.dumps(result, indent=2))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
