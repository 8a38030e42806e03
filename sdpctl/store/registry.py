"""A repository of a registry, over HTTP (distribution-spec 1.1). It imports oras-py, so it is imported where it is needed.

oras-py makes the session and answers challenges for tokens and passwords. Its functions for whole artifacts are not used: they
write a manifest anew, which changes its digest, hold a blob in memory, and wait for minutes before they try again.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

import oras.auth
import oras.auth.utils
import oras.container
import oras.logger
import oras.provider
import requests
import urllib3.exceptions

from sdpctl.errors import IntegrityError, NotFoundError, ResourceError, SdpctlError
from sdpctl.store.address import Address
from sdpctl.store.credentials import credentials_for
from sdpctl.store.layout import DIGEST, INDEX_TYPE, MANIFEST_TYPE, Descriptor, Json, canonical, sha256
from sdpctl.untrusted import load_json, open_regular, printable

T = TypeVar("T")
Watch = Callable[[int], None]
"""Receives the number of bytes that were sent or received."""

TIMEOUT = (10.0, 60.0)
"""Seconds until a connection must stand, and until the next bytes must come."""

TRIES = 3
PAUSE = 0.5
"""Seconds before the second try; before the third try twice as long."""

ANSWER_BYTES = 4 * 2**20
"""Maximum size of an answer that is not a blob: the maximum of a manifest, and of a page of tags."""

PIECE = 2**16
"""Bytes that are read at once: at most so many are fetched again after a lost connection."""

PAGES = 100
"""Maximum number of pages of a list."""

BUSY = (408, 429, 500, 502, 503, 504)

_HUB = "registry-1.docker.io"


BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, ValueError)
"""What requests raises for a lost connection, and for an answer that is not HTTP or redirects to what is not an address."""


class _LostError(ResourceError):
    """A failure that may be gone at the next try."""


class Registry:
    """A repository of a registry.

    Args:
        address: names the registry and the repository.
        plain_http: use http although the registry is not on this machine.
    """

    def __init__(self, address: Address, *, plain_http: bool = False) -> None:
        self.address = address
        self._plain = plain_http or address.is_local
        host = _HUB if address.host in ("docker.io", "index.docker.io") else address.host
        oras.logger.logger.set_level("CRITICAL")  # its lines would show what the registry says as it is
        self._client = oras.provider.Registry(host, insecure=self._plain)
        self._container = oras.container.Container(f"{host}/{address.repository}")
        self._container.registry = host  # the name of a host without a dot would be taken for a part of the repository
        self._container.namespace, _, self._container.repository = address.repository.rpartition("/")
        session = self._client.session
        session.auth = _unchanged  # otherwise requests puts a password of ~/.netrc in the place of a token
        session.hooks["response"].append(_limited)
        session.request = functools.partial(session.request, timeout=TIMEOUT)
        self._session = session
        self._auth: Any = None
        self._authorization: dict[str, str] = {}
        self._referrers_known: bool | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    # Manifests

    def manifest(self, reference: str) -> tuple[bytes, str] | None:
        """Return the bytes of a manifest and its digest; None if the repository does not have it.

        Args:
            reference: a tag or a digest.

        Raises:
            IntegrityError: if the content does not match the digest.
        """
        accept = f"{MANIFEST_TYPE}, {INDEX_TYPE}"
        answer = self._retried(lambda: self._once("GET", self._manifest_url(reference), {"Accept": accept}, missing=True))
        if answer.status_code == 404:
            return None
        content: bytes = answer.content
        found = sha256(content)
        expected = reference if DIGEST.fullmatch(reference) else answer.headers.get("Docker-Content-Digest", found)
        if found != expected:
            raise IntegrityError(
                f"{self.address.host}/{self.address.repository}: the manifest {printable(expected)[:80]} does not match its "
                "digest; the registry is damaged: push the artifact again to a different repository"
            )
        return content, found

    def has_manifest(self, digest: str) -> bool:
        """Return whether the repository has a manifest."""
        headers = {"Accept": f"{MANIFEST_TYPE}, {INDEX_TYPE}"}
        url = self._manifest_url(digest)
        return bool(self._retried(lambda: self._once("HEAD", url, headers, missing=True)).status_code == 200)

    def put_manifest(self, reference: str, content: bytes, media_type: str = MANIFEST_TYPE) -> None:
        """Send the bytes of a manifest.

        Args:
            reference: the digest of the content, or a tag, which is moved to it.
            content: the bytes, which are not changed.
            media_type: media type of the content.
        """
        url, headers = self._manifest_url(reference), {"Content-Type": media_type}
        self._retried(lambda: self._once("PUT", url, headers, body=lambda: nullcontext(content)))

    def _manifest_url(self, reference: str) -> str:
        return self._url(self._container.manifest_url(reference))

    def _url(self, path: str) -> str:
        return f"{self._client.prefix}://{path}"

    # Blobs

    def has_blob(self, blob: Descriptor) -> bool:
        """Return whether the repository has a blob."""
        url = self._url(self._container.get_blob_url(blob.digest))
        answer = self._retried(lambda: self._once("HEAD", url, missing=True))
        return bool(answer.status_code == 200 and answer.headers.get("Content-Length", str(blob.size)) == str(blob.size))

    def send_blob(self, blob: Descriptor, path: Path, watch: Watch) -> None:
        """Send the content of a file as a blob.

        Args:
            blob: descriptor of the content.
            path: path of the file.
            watch: receives the number of bytes after each piece.
        """

        def send() -> None:
            start = self._url(self._container.upload_blob_url())
            place = self._joined(start, self._once("POST", start, {"Content-Length": "0"}).headers.get("Location", ""))
            url = f"{place}{'&' if urlsplit(place).query else '?'}{urlencode({'digest': blob.digest})}"
            self._once("PUT", url, {"Content-Type": "application/octet-stream"}, body=lambda: _opened(path, blob.size, watch))

        self._retried(send)

    def pieces(self, blob: Descriptor) -> Iterator[bytes]:
        """Yield the content of a blob in pieces; after a lost connection continue where it was lost.

        Raises:
            NotFoundError: if the repository does not have the blob.
        """
        url, done, tries = self._url(self._container.get_blob_url(blob.digest)), 0, 0
        while True:
            try:
                headers = {"Range": f"bytes={done}-"} if done else {}
                with self._once("GET", url, headers, stream=True, missing=True) as answer:
                    if answer.status_code == 404:
                        raise NotFoundError(f"{self.address}: the registry does not have the blob {blob.digest}; push it again")
                    skipped = 0 if answer.status_code == 206 else done
                    for piece in self._received(answer):
                        new, skipped = piece[skipped:], max(0, skipped - len(piece))
                        done += len(new)
                        tries = 0 if new else tries
                        yield new
                if done < blob.size:
                    raise self._lost("the connection was closed early")
                return
            except _LostError:
                if done >= blob.size:
                    return
                tries += 1
                if tries >= TRIES:
                    raise
                time.sleep(PAUSE * tries)

    def _received(self, answer: Any) -> Iterator[bytes]:
        try:
            yield from answer.iter_content(PIECE)
        except BROKEN as error:
            raise self._lost(_reason(error)) from error

    # Lists

    def tags(self) -> list[str]:
        """Return the tags of the repository."""
        pages = self._pages(self._url(self._container.tags_url()), "tags")
        return [tag for page in pages or () for tag in page if isinstance(tag, str)]

    def referrers(self, digest: str) -> list[Json]:
        """Return descriptors of the manifests whose subject has this digest (distribution-spec, "Listing Referrers")."""
        pages = self._pages(self._referrers_url(digest), "manifests")
        self._referrers_known = pages is not None
        documents = self._fallback(digest) if pages is None else [document for page in pages for document in page]
        return [document for document in documents if isinstance(document, dict)]

    def add_referrer(self, subject: str, referrer: Json) -> None:
        """List a manifest among the referrers of its subject, where the registry does not do so itself.

        Such a registry has the list as an index under the tag `sha256-<hex>` of the subject (distribution-spec, "Referrers Tag
        Schema"). Two clients that change it at the same time may lose an entry; a second push adds it again.
        """
        if self._referrers_known is None:
            self.referrers(subject)
        if self._referrers_known:
            return
        listed = self._fallback(subject)
        if all(entry.get("digest") != referrer["digest"] for entry in listed if isinstance(entry, dict)):
            index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [*listed, referrer]}
            self.put_manifest(_fallback_tag(subject), canonical(index), INDEX_TYPE)

    def _fallback(self, digest: str) -> list[Any]:
        found = self.manifest(_fallback_tag(digest))
        return [] if found is None else self._list(found[0], "manifests")

    def _referrers_url(self, digest: str) -> str:
        return self._manifest_url(digest).replace(f"/manifests/{digest}", f"/referrers/{digest}")

    def _pages(self, url: str, name: str) -> list[list[Any]] | None:
        """Return the pages of a list; None if the registry has no such list."""
        pages: list[list[Any]] = []
        for _ in range(PAGES):
            answer = self._retried(functools.partial(self._once, "GET", url, {"Accept": INDEX_TYPE}, missing=True))
            if answer.status_code == 404:
                return None
            pages.append(self._list(answer.content, name))
            following = answer.links.get("next", {}).get("url")
            if not following:
                return pages
            url = self._joined(url, following)
        raise IntegrityError(
            f"{self.address}: the registry's list of {name} has more than {PAGES} pages; use a different repository"
        )

    def _list(self, content: bytes, name: str) -> list[Any]:
        try:
            found = load_json(content).get(name) or []
            if not isinstance(found, list):
                raise TypeError
        except (ValueError, TypeError, AttributeError):
            raise IntegrityError(
                f"{self.address}: the registry's list of {name} cannot be read; check that this is the address of a registry"
            ) from None
        return found

    # Requests

    def _retried(self, work: Callable[[], T]) -> T:
        """Do something again if the connection was lost or the registry is busy."""
        for attempt in range(1, TRIES):
            try:
                return work()
            except _LostError:
                time.sleep(PAUSE * attempt)
        return work()

    def _once(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] = {},
        *,
        body: Callable[[], AbstractContextManager[Any]] = nullcontext,
        stream: bool = False,
        missing: bool = False,
    ) -> Any:
        """Make a request, a second time with credentials if the registry asks for them, and return the answer.

        Args:
            method: method of HTTP.
            url: address.
            headers: headers of the request.
            body: opens the body; it is called for each try.
            stream: leave the content of the answer to be read by the caller.
            missing: return an answer that says "not found".

        Raises:
            NotFoundError: if the registry does not have the repository.
            ResourceError: if the registry cannot be reached, or refuses.
        """
        ours = _origin(url) == _origin(self._url(self._container.registry))
        for known in (False, True):
            said = {"Accept-Encoding": "identity", **headers, **(self._authorization if ours else {})}
            with body() as content:
                answer = self._asked(method, url, headers=said, data=content, stream=stream)
            if known or not ours or answer.status_code not in (401, 403) or not self._authorised(answer):
                break
            answer.close()
        if answer.status_code < 300 or (missing and answer.status_code == 404):
            return answer
        answer.close()
        raise self._refusal(answer)

    def _asked(self, method: str, url: str, **options: Any) -> Any:
        try:
            return self._session.request(method, url, **options)
        except requests.exceptions.SSLError as error:
            raise ResourceError(
                f"{self.address.host}: no secure connection ({_reason(error)}); check the name, or use --plain-http if the "
                "registry speaks http"
            ) from error
        except BROKEN as error:
            raise self._lost(_reason(error)) from error

    def _joined(self, url: str, link: str) -> str:
        """Return the address that a registry names, which may be relative.

        Raises:
            ResourceError: if this is not an address.
        """
        try:
            joined = urljoin(url, link)
            _origin(joined)
        except ValueError:
            raise ResourceError(f"{self.address}: the registry names an address that is not valid; check the address") from None
        return joined

    def _authorised(self, answer: Any) -> bool:
        """Answer a challenge for credentials; return whether the request may succeed now.

        Raises:
            ResourceError: if the registry would have the credentials sent without encryption.
        """
        challenge = answer.headers.get("Www-Authenticate", "")
        basic = challenge.lower().startswith("basic")
        realm = oras.auth.utils.parse_auth_header(challenge).realm
        scheme = (realm or "").partition("://")[0].lower()
        if not basic and scheme not in ("http", "https"):
            return False
        if not basic and scheme == "http" and not self._plain:
            raise ResourceError(f"{self.address.host}: the registry wants credentials to be sent without encryption; not done")
        credentials = credentials_for(self.address)
        if basic and credentials is None:
            return False
        auth = oras.auth.get_auth_backend("basic" if basic else "token", self._session, self._plain)
        if credentials is not None:
            auth.set_basic_auth(*credentials)
        try:
            headers, changed = auth.authenticate_request(answer, {})
        except requests.ConnectionError as error:
            raise self._lost(_reason(error)) from error
        except (*BROKEN, AttributeError, TypeError):  # oras does not check the form of a token's document
            return False
        if not changed or headers == self._authorization:
            return False
        self._authorization = headers
        return True

    def _lost(self, reason: str) -> _LostError:
        return _LostError(f"{self.address}: {reason}; check the address and the connection; the same command continues")

    def _refusal(self, answer: Any) -> SdpctlError:
        status = answer.status_code
        try:
            said = load_json(answer.content)["errors"][0]
            reason = f"{status}, {printable(str(said.get('message') or said.get('code')))[:200]}"
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            reason = f"{status}, {printable(str(answer.reason))[:200]}"
        if status in BUSY:
            return self._lost(f"the registry cannot answer now ({reason})")
        if status in (401, 403):
            login = f"log in with `docker login {self.address.host}` or `skopeo login {self.address.host}`"
            known = "refuses the credentials that a client has stored" if self._authorization else "wants credentials"
            return ResourceError(f"{self.address}: the registry {known} ({reason}); {login}")
        if status == 404:
            return NotFoundError(f"{self.address}: the registry does not have this ({reason}); correct the address")
        return ResourceError(f"{self.address}: the registry refuses ({reason})")


@contextmanager
def _opened(path: Path, size: int, watch: Watch) -> Iterator["_Body | bytes"]:
    """Open a file as the body of a request; for an empty body requests wants no file."""
    with open_regular(path) as file:
        yield _Body(file, size, watch) if size else b""


class _Body:
    """The content of a file as the body of a request; requests reads its length, and then its pieces."""

    def __init__(self, file: BinaryIO, size: int, watch: Watch) -> None:
        self._file, self._size, self._watch = file, size, watch

    def __len__(self) -> int:
        return self._size

    def read(self, size: int) -> bytes:
        piece = self._file.read(size)
        self._watch(len(piece))
        return piece


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Return the scheme, the host and the port of an address.

    Raises:
        ValueError: if this is not an address.
    """
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _fallback_tag(digest: str) -> str:
    return digest.replace(":", "-")


def _unchanged(request: Any) -> Any:
    return request


def _limited(answer: Any, *, stream: bool = False, **_: Any) -> Any:
    """Read an answer that is not a blob, up to a limit."""
    if not stream:
        content = b""
        for piece in answer.iter_content(PIECE):
            content += piece
            if len(content) > ANSWER_BYTES:
                answer.close()
                raise requests.exceptions.ContentDecodingError(f"an answer has more than {ANSWER_BYTES:,} bytes")
        answer._content = content
    return answer


def _reason(error: BaseException) -> str:
    """Return the innermost reason of an error of requests, without the address, which may hold a secret."""
    reason: Any = error
    while True:
        inner = (
            getattr(reason, "reason", None)
            or reason.__cause__
            or next((part for part in reason.args if isinstance(part, BaseException)), None)
        )
        if not isinstance(inner, BaseException):
            break
        reason = inner
    if isinstance(reason, TimeoutError) or "Timeout" in type(reason).__name__:
        return "the registry does not answer"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror[:200]
    return {"IncompleteRead": "the connection was closed early", "NameResolutionError": "there is no host of this name"}.get(
        type(reason).__name__, printable(type(reason).__name__)
    )
