"""Addresses of artifacts in a registry: `oci://HOST[:PORT]/REPOSITORY:TAG` (distribution-spec 1.1, "Pulling manifests")."""

import ipaddress
import re
from dataclasses import dataclass, replace

from sdpctl.errors import UsageError, shown
from sdpctl.store.layout import DIGEST

SCHEME = "oci://"
TAG_BYTES = 128
REPOSITORY_BYTES = 255

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?)(:(?P<port>[0-9]{1,5}))?")
_PART = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PART}(/{_PART})*")
_TAG = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{TAG_BYTES - 1}}}")


@dataclass(frozen=True)
class Address:
    """The address of an artifact in a registry.

    Args:
        host: name of the registry, with its port if there is one.
        repository: path of the repository within the registry.
        tag: tag in the repository; None if the address ends with a digest.
        digest: digest of the manifest; None if the address ends with a tag.
    """

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Parse an address.

        Raises:
            UsageError: if the text is not an address.
        """
        example = "give oci://HOST/REPOSITORY:TAG, for example oci://ghcr.io/me/digits:v1"
        host, slash, path = text.removeprefix(SCHEME).partition("/")
        if "@" in host:  # the text is not shown, since it may contain a password
            raise UsageError(f"an address does not contain credentials: log in with a client of the registry, then {example}")
        if not text.startswith(SCHEME) or not slash:
            raise UsageError(f"{shown(text)} is not an address; {example}")
        matched = _HOST.fullmatch(host)
        if matched is None or int(matched["port"] or 1) not in range(1, 65536):
            raise UsageError(f"{shown(text)}: {shown(host)} is not the name of a registry; {example}")
        repository, at, digest = path.partition("@")
        tag = None
        if not at:
            repository, _, tag = path.partition(":")
        if not _REPOSITORY.fullmatch(repository) or len(repository) > REPOSITORY_BYTES:
            raise UsageError(
                f"{shown(text)}: {shown(repository)} is not a repository: use lower-case letters, digits, and single '.', '_' "
                f"or '-' between them; {example}"
            )
        if at:
            if not DIGEST.fullmatch(digest):
                raise UsageError(
                    f"{shown(text)}: {shown(digest)} is not a digest; a digest is sha256: and 64 hexadecimal digits"
                )
            return cls(host, repository, digest=digest)
        return cls(host, repository).with_tag(tag or "")

    def with_tag(self, tag: str) -> "Address":
        """Return the address of a tag in the same repository.

        Raises:
            UsageError: if the text cannot be a tag of a registry.
        """
        if not _TAG.fullmatch(tag):
            raise UsageError(
                f"{self}: {shown(tag)} is not a tag of a registry: use letters, digits, '.', '_' and '-', at most {TAG_BYTES}; "
                "write it after the repository and a colon, as in oci://HOST/REPOSITORY:TAG"
            )
        return replace(self, tag=tag, digest=None)

    @property
    def reference(self) -> str:
        """The tag or the digest."""
        return self.tag or self.digest or ""

    @property
    def is_local(self) -> bool:
        """Whether the registry is on this machine, where clients use plain http."""
        name = self.host.rpartition(":")[0] if re.search(r":[0-9]+$", self.host) else self.host
        try:
            return ipaddress.ip_address(name.strip("[]")).is_loopback
        except ValueError:
            return name.lower() == "localhost"

    def __str__(self) -> str:
        end = f":{self.tag}" if self.tag else f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{end}"
