"""The server that a study's trials may be kept on instead of a file: its url, its password, and patience while it is away.

A url is one of SQLAlchemy's (`postgresql+psycopg://user@host/database`), or `grpc://host:port` for a proxy of Optuna's that holds the
database. A password is never part of what is stored or shown.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError, PendingRollbackError

from lowsearch.errors import StudyError, UsageError

log = logging.getLogger(__name__)

PASSWORD = "LOWSEARCH_STORAGE_PASSWORD"
"""Environment variable that holds the password; without it the driver looks where it always does (PGPASSWORD, ~/.pgpass)."""
PATIENCE_S = 300.0
"""How long a database that was there may be away before a study gives up."""

_EXAMPLE = "--storage postgresql+psycopg://user@host/database, or grpc://host:port"
_LONGEST_WAIT_S = 1.0  # Much less than a lease: who watches must not be back long before who beats.
_EXTRAS = {"postgresql": 'pip install "lowsearch[postgresql]"', "grpc": 'pip install "lowsearch[grpc]"'}
_LIBPQ = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
"""A machine that vanishes without a word is noticed within a minute, not after the kernel's quarter of an hour."""


def split_password(url: str) -> tuple[str, str | None]:
    """`url` without its password, and the password. Raises UsageError where `url` names no server."""
    if url.startswith("grpc://"):
        return url, None
    parsed = _parsed(url)
    asked = parsed.query.get("password")
    password = parsed.password if parsed.password is not None else asked if isinstance(asked, str) else None
    bare = parsed._replace(password=None).difference_update_query(["password"])  # `set` leaves out what is None.
    return bare.render_as_string(hide_password=False), None if password is None else str(password)


def check_url(url: str) -> None:
    """Raise UsageError where `url` names no server, or holds a password."""
    if url.startswith("grpc://"):
        _host_and_port(url)
    elif split_password(url)[1] is not None:
        raise UsageError("the url of a storage holds a password, which would end up in study.yaml", hint=f"leave it out and set {PASSWORD}")


def connect(url: str, *, patience_s: float = PATIENCE_S) -> BaseStorage:
    """Optuna's storage at `url`, which waits for a database that goes away.

    Raises StudyError where it does not answer within `patience_s` now, and where its driver is not installed.
    """
    check_url(url)
    opening = Patience(url, patience_s)
    try:
        inner = opening(_proxy, url) if url.startswith("grpc://") else opening(_database, _parsed(url))
    except (ImportError, NoSuchModuleError) as error:
        scheme = url.partition(":")[0].partition("+")[0]
        raise StudyError(
            f"the driver for {url.partition(':')[0]} is not installed: {_first_line(error)}",
            hint=_EXTRAS.get(scheme, "install it with pip, or name another driver, as in mysql+pymysql://…"),
        ) from error
    return PatientStorage(inner, Patience(url))


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise UsageError("the url of the storage cannot be read", hint=_EXAMPLE) from error
    if parsed.get_backend_name() == "sqlite":
        raise UsageError("SQLite is a study's own file, no server", hint="leave --storage out, or " + _EXAMPLE)
    return parsed


def _host_and_port(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise UsageError(f"the storage {url!r} names no host and port", hint="--storage grpc://host:13000")
    return host, port


def _database(url: URL) -> BaseStorage:
    password = os.environ.get(PASSWORD)
    if password is not None:
        url = url.set(password=password)
    options = {"connect_args": dict(_LIBPQ)} if url.get_backend_name() == "postgresql" else {}
    storage = RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=options)
    cached = _CachedStorage(storage)
    weakref.finalize(cached, storage.engine.dispose)  # Optuna never closes its connections.
    return cached


def _proxy(url: str) -> BaseStorage:
    host, port = _host_and_port(url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna calls it so since 4.2; the tests hold what is used of it.
        proxy = GrpcStorageProxy(host=host, port=port)
    proxy.wait_server_ready(timeout=10)
    return proxy


def is_away(error: BaseException) -> bool:
    """Whether `error` says that the database does not answer, and not that it refuses what was asked."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, PendingRollbackError):
        return True  # Optuna goes on within a transaction that the end of the connection has broken.
    if isinstance(cause, DBAPIError):
        return cause.connection_invalidated or isinstance(cause, OperationalError | InterfaceError)
    if type(cause).__module__.startswith("grpc"):
        code = getattr(cause, "code", None)
        # A proxy says UNKNOWN where its own database has failed it.
        return callable(code) and getattr(code(), "name", "") in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN")
    return isinstance(cause, ConnectionError)


class Patience:
    """Calls again what fails because the database is away, and gives up after `seconds`."""

    def __init__(
        self,
        name: str,
        seconds: float = PATIENCE_S,
        *,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._seconds, self._sleep, self._now = name, seconds, sleep, now
        self._lost = False

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of the call. Raises StudyError where patience ran out; any other error at once."""
        since: float | None = None
        wait_s = 0.25
        while True:
            try:
                result = call(*args, **kwargs)
            except Exception as error:
                if not is_away(error):
                    raise
                since = self._now() if since is None else since
                left_s = self._seconds - (self._now() - since)
                if left_s <= 0 or self._lost:
                    self._lost = True  # Who asks again on the way out is told at once.
                    raise self._gone(error) from error
                if wait_s == 0.25:
                    log.warning("database away, retrying for %.0f s: %s (%s)", self._seconds, self._name, _first_line(error))
                self._sleep(min(wait_s, left_s))
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
                continue
            self._lost = False
            if since is not None:
                log.warning("database back after %.0f s: %s", self._now() - since, self._name)
            return result

    def _gone(self, error: BaseException) -> StudyError:
        if self._seconds > 0:
            return StudyError(
                f"the database {self._name} has not answered for {self._seconds:.0f} s: {_first_line(error)}",
                hint="start the server again; nothing is lost, and the same command resumes",
            )
        return StudyError(
            f"the database {self._name} does not answer: {_first_line(error)}",
            hint=f"check --storage and that the server runs; a password is read from {PASSWORD}, PGPASSWORD or ~/.pgpass",
        )


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    cause = cause.orig if isinstance(cause, DBAPIError) and cause.orig else cause
    details = getattr(cause, "details", None)
    text = str(details() if callable(details) else cause).strip()
    return text.splitlines()[0] if text else type(cause).__name__


def _patient(name: str) -> Callable[..., Any]:
    def method(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        return self.patience(getattr(self.inner, name), *args, **kwargs)

    method.__name__ = name
    return method


class PatientStorage(BaseStorage):
    """A storage whose every call waits for a database that is away.

    A call whose answer was lost is made again. What that leaves behind is harmless: a trial that nobody holds, which is handed back
    like that of a dead worker.
    """

    def __init__(self, inner: BaseStorage, patience: Patience) -> None:
        self.inner, self.patience = inner, patience

    create_new_study = _patient("create_new_study")
    delete_study = _patient("delete_study")
    set_study_user_attr = _patient("set_study_user_attr")
    set_study_system_attr = _patient("set_study_system_attr")
    get_study_id_from_name = _patient("get_study_id_from_name")
    get_study_name_from_id = _patient("get_study_name_from_id")
    get_study_directions = _patient("get_study_directions")
    get_study_user_attrs = _patient("get_study_user_attrs")
    get_study_system_attrs = _patient("get_study_system_attrs")
    get_all_studies = _patient("get_all_studies")
    create_new_trial = _patient("create_new_trial")
    set_trial_param = _patient("set_trial_param")
    get_trial_id_from_study_id_trial_number = _patient("get_trial_id_from_study_id_trial_number")
    get_trial_number_from_id = _patient("get_trial_number_from_id")
    get_trial_param = _patient("get_trial_param")
    set_trial_intermediate_value = _patient("set_trial_intermediate_value")
    set_trial_user_attr = _patient("set_trial_user_attr")
    set_trial_system_attr = _patient("set_trial_system_attr")
    get_trial = _patient("get_trial")
    get_all_trials = _patient("get_all_trials")
    get_n_trials = _patient("get_n_trials")
    get_best_trial = _patient("get_best_trial")
    remove_session = _patient("remove_session")

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        try:
            return self.patience(self.inner.set_trial_state_values, trial_id, state, values)
        except UpdateFinishedTrialError:
            told = self.get_trial(trial_id)
            if told.state == state and (values is None or told.values == list(values)):
                return True  # It was told; the answer was lost.
            raise
