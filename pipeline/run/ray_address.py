"""Which Ray a job runs on, and the token that it asks for.

Ray itself tries for two minutes to reach an address where nothing is, and for twenty seconds a
token that is refused, and then says neither. Here both are asked first.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pipeline.errors import UserError

TOKEN_FIX = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"
"""The end of an error about tokens."""

_VARIABLE = "RAY_ADDRESS"
_FORM = "write HEAD:6379, the address that `ray start --head` prints"

_CONNECT_SECONDS = 10.0
"""Longest wait for the head to take a connection. Less refuses a head that is far away; more is
silence where nothing is."""


def find_token() -> str | None:
    """The token of Ray's token authentication: RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH
    names, or ~/.ray/auth_token; None if there is none.

    Raises:
        UserError: the file cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        file = Path(named) if named else Path.home() / ".ray" / "auth_token"
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # no home, or no text
        if named is None:
            return None
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"RAY_AUTH_TOKEN_PATH: {named} cannot be read: {reason}") from None


def find_cluster() -> str | None:
    """HOST:PORT of the cluster at RAY_ADDRESS; None if a local Ray is to be started.

    The cluster is there, and this process is set up with the token that it asks for.

    Raises:
        UserError: no Ray is there, it refuses the token, or the variable is no address of one.
    """
    given = os.environ.get(_VARIABLE, "").strip()
    if given in {"", "local"}:
        return None
    address = _running() if given == "auto" else given
    host, port = _parts(address)
    _reach(host, port, address)
    _authenticate(address)
    return address


def _running() -> str:
    """The address of the Ray that runs on this machine."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return str(canonicalize_bootstrap_address("auto"))
    except ConnectionError:
        raise UserError(
            f"{_VARIABLE}: auto, and no Ray runs on this machine; `ray start --head` starts one"
        ) from None


def _parts(address: str) -> tuple[str, int]:
    scheme, separator, _ = address.rpartition("://")
    if separator:
        kind = {"ray": "of a Ray Client, through which no job runs", "http": "of a dashboard"}
        what = kind.get(scheme.removesuffix("s"), "of no Ray")
        raise UserError(
            f"{_VARIABLE}: {scheme}:// is an address {what}; {_FORM}, on a machine of the "
            "cluster, or use `specbatch submit`"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) >= 2**16:
        raise UserError(f"{_VARIABLE}: {address!r} is no address; {_FORM}")
    return host.strip("[]"), int(port)


def _reach(host: str, port: int, address: str) -> None:
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:  # a name that cannot be one
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{_VARIABLE}: no Ray cluster at {address}: {reason}; does it run, and is this its "
            "address? Unset, a local Ray is started"
        ) from None


def _authenticate(address: str) -> None:
    """Find out whether the cluster asks for a token, and have Ray send it if it does."""
    from ray.exceptions import AuthenticationError

    asked = f"{_VARIABLE}: the Ray cluster at {address} asks for a token"
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" and find_token() is None:
        raise UserError(f"RAY_AUTH_MODE is token, and there is no token: {TOKEN_FIX}")
    try:
        _ask(address)
        return
    except AuthenticationError:
        if find_token() is None:
            raise UserError(f"{asked}: {TOKEN_FIX}") from None
    try:
        _use_token()
        _ask(address)
    except AuthenticationError:
        raise UserError(f"{asked}, and does not take this one: {TOKEN_FIX}") from None


def _ask(address: str) -> None:
    """Ask the cluster for its id, as `ray.init` does first.

    Raises:
        AuthenticationError: it does not take the token, or asks for one.
        UserError: what answers there is no Ray.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    try:
        GcsClient(address=address)
    except AuthenticationError:
        raise
    except Exception as error:
        raise UserError(f"{_VARIABLE}: no Ray cluster at {address}: {error}; {_FORM}") from None


def _use_token() -> None:
    """Turn on Ray's token authentication in this process, which has read its settings before."""
    from ray._raylet import Config  # type: ignore[attr-defined]

    os.environ["RAY_AUTH_MODE"] = "token"
    Config.initialize("")
