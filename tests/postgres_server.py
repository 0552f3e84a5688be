"""A PostgreSQL server of one's own, from the binaries of the system: what test_scale.py and benchmarks/scale.py share."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

USER = "lowsearch"
PASSWORD = "not stored anywhere"


def binary(name: str) -> str | None:
    """Path of a PostgreSQL binary; Debian keeps those of a server out of PATH."""
    found = [path for path in sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}")) if os.access(path, os.X_OK)]
    return shutil.which(name) or (found[-1] if found else None)


def missing() -> str:
    """Why no server can be started here; empty where one can."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return 'psycopg is not installed: pip install "lowsearch[postgresql]"'
    if not all(map(binary, ("initdb", "pg_ctl", "postgres"))):
        return "no PostgreSQL server is installed: apt install postgresql"
    return "" if os.geteuid() or _unprivileged() else "PostgreSQL refuses to run as root, and there is no user postgres or nobody"


def _unprivileged() -> str | None:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


class PostgresServer:
    """Started on entry, in a folder and on a port of its own; stopped and removed on exit."""

    def __init__(self, *options: str) -> None:
        """`options` go to the server, as `-c max_connections=200`."""
        self._folder = Path(tempfile.mkdtemp(prefix="lowsearch-postgres-"))
        self._options = options
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:  # The server refuses to run as root.
            user = pwd.getpwnam(_unprivileged() or "")
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    @property
    def url(self) -> str:
        """For --storage; the password is not in it."""
        return f"postgresql+psycopg://{USER}@127.0.0.1:{self.port}/postgres"

    def __enter__(self) -> PostgresServer:
        password = self._folder / "password"
        password.write_text(PASSWORD + "\n")
        password.chmod(0o644)
        self._run("initdb", "-D", "data", "-U", USER, "-A", "scram-sha-256", "--pwfile", "password", "--no-sync", "-E", "UTF8")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    def start(self) -> None:
        options = " ".join(["-c listen_addresses=127.0.0.1", f"-p {self.port}", "-k ''", *self._options])
        self._run("pg_ctl", "-D", "data", "-w", "-l", "log", "-o", options, "start")

    def stop(self) -> None:
        """At once, as in a crash: open connections are cut."""
        self._run("pg_ctl", "-D", "data", "-w", "-m", "immediate", "stop")

    def _run(self, name: str, *arguments: str) -> None:
        program = binary(name)
        assert program is not None
        done = subprocess.run(
            [program, *arguments], cwd=self._folder, env={"PATH": os.environ["PATH"], "LC_ALL": "C"}, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, timeout=120, check=False, **self._as,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
