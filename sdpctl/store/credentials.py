"""Credentials for a registry, from the configuration of the clients that log in: docker, podman, skopeo, oras.

Nothing here prints, logs or stores a credential.
"""

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdpctl.errors import ResourceError
from sdpctl.store.address import Address
from sdpctl.untrusted import load_json, printable_path, read_regular

CONFIG_BYTES = 2**22
DOCKER_HUB = "https://index.docker.io/v1/"
"""The key under which clients keep the credentials of docker.io."""

HELPER_SECONDS = 60
IDENTITY_TOKEN = "<token>"
"""User name by which a helper says that the secret is an identity token, not a password."""


def credentials_for(address: Address) -> tuple[str, str] | None:
    """Return the user name and the password for a repository; None if no client has logged in.

    Raises:
        ResourceError: if a configuration file cannot be read, or a credential helper fails.
    """
    return next((found for path in _files() if (found := _from_file(path, address)) is not None), None)


def _files() -> Iterator[Path]:
    """Yield the existing files in which clients keep credentials, in order of precedence."""
    home, runtime = Path.home(), os.environ.get("XDG_RUNTIME_DIR")
    paths = [Path(named)] if (named := os.environ.get("REGISTRY_AUTH_FILE")) else []
    paths.append(Path(os.environ.get("DOCKER_CONFIG") or home / ".docker") / "config.json")
    paths += [Path(runtime) / "containers" / "auth.json"] if runtime else []
    paths.append(Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "containers" / "auth.json")
    yield from (path for path in paths if os.path.lexists(path))


def _from_file(path: Path, address: Address) -> tuple[str, str] | None:
    try:
        config = load_json(read_regular(path, limit=CONFIG_BYTES))
        auths, helpers = config.get("auths") or {}, config.get("credHelpers") or {}
        for name in _names(address):
            entry: Any = auths.get(name) or next((auths[key] for key in auths if _is_url_of(key, name)), {})
            if encoded := entry.get("auth"):
                user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
                return user, password
            if helper := helpers.get(name):
                return _from_helper(str(helper), name)
        if store := config.get("credsStore"):
            return _from_helper(str(store), _names(address)[-1])
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not the configuration of a client"
        raise ResourceError(
            f"{printable_path(path)}: this file cannot be read ({reason}); log in again with that client"
        ) from None
    return None


def _names(address: Address) -> list[str]:
    """Return the names under which credentials for a repository may be kept, the most specific first."""
    if address.host in ("docker.io", "index.docker.io", "registry-1.docker.io"):
        return ["docker.io", DOCKER_HUB]
    parts = address.repository.split("/")
    paths = ["/".join([address.host, *parts[:count]]) for count in range(len(parts), 0, -1)]
    return [*paths, address.host]


def _is_url_of(key: str, name: str) -> bool:
    """Return whether a key such as `https://HOST/v2/` belongs to a host."""
    return "://" in key and key.partition("://")[2].partition("/")[0] == name


def _from_helper(helper: str, name: str) -> tuple[str, str] | None:
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run([program, "get"], input=name.encode(), capture_output=True, check=False, timeout=HELPER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no answer within {HELPER_SECONDS} s"
        raise ResourceError(
            f"{name}: the credential helper {program!r} does not work ({reason}); install it, or log in again"
        ) from None
    if done.returncode:
        if b"credentials not found" in done.stdout:
            return None
        raise ResourceError(f"{name}: the credential helper {program!r} ended with {done.returncode}; log in again")
    try:
        answer: Any = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError):
        raise ResourceError(f"{name}: the answer of the credential helper {program!r} cannot be read; log in again") from None
    if user == IDENTITY_TOKEN:
        raise ResourceError(f"{name}: {program!r} has an identity token, which is not supported; log in with an access token")
    return user, secret
