"""A private PostgreSQL for the tests: started once per pytest process, on a socket in a folder of its own.

Why not a service: a claim about PostgreSQL is tested against PostgreSQL wherever its programs are installed, and says
why it was not where they are missing. Use: import `postgres_url` in a conftest.py, call `fresh_schema` for each test.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

USERS = ("postgres", "nobody")  # it refuses to run as root
SETTINGS = {
    # Nothing here outlives the tests; what is tested is not a power cut of this server.
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "listen_addresses": "",
    "autovacuum": "off",
}


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """URL of an empty database; skips, with the reason, where PostgreSQL cannot be started."""
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (no initdb found)")
    try:
        import psycopg  # noqa: F401
    except ImportError:
        pytest.skip("psycopg is not installed")
    # A short path: a socket's name has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="lmpg-", dir="/tmp"))
    try:
        with Server(programs, folder):
            yield f"postgresql://tester@/postgres?host={folder}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fresh_schema(url: str) -> str:
    """A URL at which the database looks empty: tables made there are in a schema of their own."""
    from sqlalchemy import create_engine, text

    name = f"t{secrets.token_hex(6)}"
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {name}"))
    engine.dispose()
    return f"{url}&options=-csearch_path%3D{name}"


def find_programs() -> Path | None:
    """The folder with initdb and postgres; the newest of several."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    roots = (Path("/usr/lib/postgresql"), Path("/usr/local/pgsql"), Path("/opt/homebrew/opt"))
    for root in roots:
        folders += sorted(root.glob("*/bin"), reverse=True) if root.is_dir() else []
    return next((f for f in folders if (f / "initdb").exists() and (f / "postgres").exists()), None)


class Server:
    """The server, from `with` to its end; skips the test where it does not start."""

    def __init__(self, programs: Path, folder: Path):
        self.programs, self.folder = programs, folder
        self.who = unprivileged()

    def __enter__(self) -> None:
        if self.who:
            shutil.chown(self.folder, self.who["user"], self.who["group"])
        data = self.folder / "data"
        self.call(
            "initdb",
            "-D",
            str(data),
            "-U",
            "tester",
            "-A",
            "trust",
            "-N",
            "--no-locale",
            "-E",
            "UTF8",
        )
        options = " ".join(f"-c {name}='{value}'" for name, value in SETTINGS.items())
        options += f" -c unix_socket_directories='{self.folder}'"
        log = str(self.folder / "log")
        self.call("pg_ctl", "-D", str(data), "-w", "-t", "60", "-l", log, "-o", options, "start")

    def __exit__(self, *_: object) -> None:
        self.call("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", "immediate", "stop")

    def call(self, program: str, *arguments: str) -> None:
        environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "HOME": str(self.folder)}
        done = subprocess.run(
            [str(self.programs / program), *arguments],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would stay open as long as the server
            stderr=subprocess.STDOUT,
            timeout=120,
            **self.who,
        )
        if done.returncode != 0:
            pytest.skip(f"PostgreSQL cannot be used here: {program} failed ({done.returncode})")


def unprivileged() -> dict[str, Any]:
    """Whom to run as: ourselves, or another user where we are root."""
    if os.geteuid() != 0:
        return {}
    for name in USERS:
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root and there is no other user here")
