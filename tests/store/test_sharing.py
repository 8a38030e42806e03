"""Push and pull through a real registry: what arrives, what is sent twice, and what each fault says."""

import base64
import http.server
import json
import os
import re
import stat
import subprocess
import sys
import threading
from itertools import pairwise

import pytest
from cascade_options import EASY
from command import called, document, one_line
from outside import needs
from registry_process import PASSWORD, USER, Proxy, running

from sdpctl.store import Store
from sdpctl.store.layout import INDEX_TYPE, MANIFEST_TYPE, canonical, sha256

pytestmark = needs("docker-registry", "curl")

WEIGHTS = bytes(range(256)) * 12_000  # 3 MB


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    with running(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A registry that asks for a password."""
    with running(tmp_path_factory.mktemp("guarded"), password=True) as registry:
        yield registry


@pytest.fixture(autouse=True)
def _no_credentials(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def place(registry, request):
    """The address of a repository that no other test has."""
    return f"oci://{registry.host}/tests/{re.sub('[^a-z0-9]+', '-', request.node.name.lower()).strip('-')}"


@pytest.fixture
def store(tmp_path):
    store = Store.create(tmp_path / ".sdpctl")
    checkpoint = store.commit("checkpoint", {"model.safetensors": WEIGHTS, "recipe.yaml": b"seed: 0\n"}, key="c", tag="digits")
    layers = {"statistics.safetensors": b"statistics" * 999, "nodes.json": b"[]", "nothing.jsonl": b""}
    statistics = store.commit("bn-statistics", layers, subject=checkpoint, key="s", tag="digits.bn")
    store.commit("evaluation", {"results.json": b'{"rows":[]}'}, subject=statistics, key="e", tag="digits.eval")
    store.commit("checkpoint", {"model.safetensors": b"others"}, tag="others")
    return store


def tags_of(folder, name=".sdpctl"):
    return {artifact.tag: artifact.digest for artifact in Store(folder / name).artifacts()}


def manifest_of(registry, repository, reference):
    done = subprocess.run(
        [
            "curl",
            "-sf",
            "-H",
            f"Accept: {MANIFEST_TYPE}, {INDEX_TYPE}",
            f"http://{registry.host}/v2/{repository}/manifests/{reference}",
        ],
        capture_output=True,
        check=False,
    )
    return done.stdout if done.returncode == 0 else None


def test_a_pulled_network_is_evaluated_to_the_same_digests(tmp_path, place):
    (tmp_path / "easy.yaml").write_text(EASY.replace("batches: 8", "batches: 1").replace("epochs: 1", "epochs: 0"))
    made = document(tmp_path, "run", "easy.yaml")
    pushed = document(tmp_path, "store", "push", "easy", f"{place}:v1", "--recursive")
    assert pushed["digest"] == made["train"]["digest"]
    assert [artifact["kind"] for artifact in pushed["artifacts"]] == ["checkpoint", "bn-statistics", "evaluation"]

    whole = tmp_path / "whole"
    whole.mkdir()
    pulled = document(whole, "store", "pull", f"{place}:v1", "easy", "--recursive")
    assert [artifact["digest"] for artifact in pulled["artifacts"]] == [a["digest"] for a in pushed["artifacts"]]
    assert tags_of(whole) == tags_of(tmp_path)
    assert document(whole, "eval", "easy") == document(tmp_path, "eval", "easy")
    assert called(whole, "store", "verify").returncode == 0

    alone = tmp_path / "alone"
    alone.mkdir()
    document(alone, "store", "pull", f"{place}:v1", "easy")
    assert list(tags_of(alone)) == ["easy"], "without --recursive only what it was made from"
    assert document(alone, "eval", "easy")["digest"] == made["eval-instances"]["digest"], "computed again"
    assert tags_of(alone) == tags_of(tmp_path)


def test_lineage_is_there_by_digest_and_as_referrers(tmp_path, store, registry, place):
    repository = place.removeprefix(f"oci://{registry.host}/")
    document(tmp_path, "store", "push", "digits.eval", f"{place}:table")
    evaluation = store.resolve("digits.eval")
    chain = [evaluation, store.at(evaluation.subject)]
    chain.append(store.at(chain[-1].subject))
    for artifact in chain:
        path = store.path / "blobs" / "sha256" / artifact.digest.removeprefix("sha256:")
        assert manifest_of(registry, repository, artifact.digest) == path.read_bytes(), "not one byte changes"
    for child, parent in pairwise(chain):
        index = json.loads(manifest_of(registry, repository, parent.digest.replace(":", "-")))
        (entry,) = index["manifests"]
        assert (entry["digest"], entry["size"]) == (child.digest, child.descriptor.size)
        assert entry["artifactType"] == f"application/vnd.sdpctl.{child.kind}.v1+json"

    document(tmp_path, "store", "pull", f"{place}:table", "table", "--store", "other")
    other = Store(tmp_path / "other")
    assert {artifact.digest for artifact in other.artifacts()} == {artifact.digest for artifact in chain}
    assert other.resolve("table").digest == evaluation.digest
    assert list(other.verify()) == []
    assert other.gc(untagged=True, grace=0).entries == ()


def test_recursive_takes_what_was_made_from_it_with_its_tags(tmp_path, store, place):
    pushed = document(tmp_path, "store", "push", "digits", f"{place}:v1", "-r")
    assert [artifact["tag"] for artifact in pushed["artifacts"]] == ["v1", "v1.bn", "v1.eval"]
    document(tmp_path, "store", "pull", f"{place}:v1", "mine", "-r", "--store", "other")
    ours, theirs = tags_of(tmp_path), tags_of(tmp_path, "other")
    assert theirs == {name.replace("digits", "mine"): digest for name, digest in ours.items() if name != "others"}


def test_nothing_is_sent_or_fetched_twice(tmp_path, store, registry, place):
    proxy = Proxy(registry.host)
    near = place.replace(registry.host, proxy.host)
    first = document(tmp_path, "store", "push", "digits.bn", f"{near}:v1")
    assert first["bytes"] > len(WEIGHTS)
    assert proxy.passed["up"] > len(WEIGHTS)
    proxy.passed = {"up": 0, "down": 0}
    assert document(tmp_path, "store", "push", "digits.eval", f"{near}:v2")["blobs"] == [
        layer.digest for layer in store.resolve("digits.eval").layers.values()
    ]
    assert proxy.passed["up"] < 20_000

    document(tmp_path, "store", "pull", f"{near}:v1", "--store", "other")
    proxy.passed = {"up": 0, "down": 0}
    assert document(tmp_path, "store", "pull", f"{near}:v1", "--store", "other")["blobs"] == []
    assert proxy.passed["down"] < 20_000
    proxy.stop()


def test_pull_mends_a_damaged_blob(tmp_path, store, place):
    document(tmp_path, "store", "push", "digits", f"{place}:v1")
    path = store.path / "blobs" / "sha256" / store.resolve("digits").layers["model.safetensors"].digest[7:]
    path.chmod(0o644)
    path.write_bytes(WEIGHTS[:-1] + b"!")
    done = called(tmp_path, "store", "push", "digits", f"{place}:v2")
    assert done.returncode == 0, "the registry has the blob, so it is not sent"
    one_line(called(tmp_path, "store", "push", "digits", f"{place}-2:v1"), 5, path.name, "restore it from a copy")
    assert document(tmp_path, "store", "pull", f"{place}:v1", "digits")["blobs"] == [f"sha256:{path.name}"]
    assert list(store.verify()) == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


@pytest.mark.parametrize("what", ["model.safetensors", "manifest"])
def test_a_flipped_byte_in_the_registry_is_refused_and_nothing_changes(tmp_path, store, registry, place, what):
    document(tmp_path, "store", "push", "digits.bn", f"{place}:v1")
    checkpoint = store.resolve("digits")
    digest = checkpoint.digest if what == "manifest" else checkpoint.layers[what].digest
    path = registry.blob(digest)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    try:
        Store.create(tmp_path / "other")
        one_line(called(tmp_path, "store", "pull", f"{place}:v1", "--store", "other"), 5, digest, "does not match its digest")
        assert Store(tmp_path / "other").artifacts() == []
        assert not (tmp_path / "other" / "blobs" / "sha256" / digest.removeprefix("sha256:")).exists()
        assert list((tmp_path / "other" / "tmp").iterdir()) == []
    finally:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    document(tmp_path, "store", "pull", f"{place}:v1", "--store", "other")


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr("sdpctl.store.registry.PAUSE", 0.01)


def test_a_connection_that_is_lost_once_is_taken_up_again(tmp_path, store, registry, place, no_pause):
    proxy = Proxy(registry.host, after=1_000_000, times=1)
    near = place.replace(registry.host, proxy.host)
    document(tmp_path, "store", "push", "digits", f"{near}:v1")
    assert proxy.times == 0, "the proxy has closed a connection"
    proxy.times, proxy.passed = 1, {"up": 0, "down": 0}
    document(tmp_path, "store", "pull", f"{near}:v1", "--store", "other")
    assert proxy.times == 0
    assert proxy.passed["down"] < len(WEIGHTS) + 100_000, "the second request asks for the rest only"
    assert list(Store(tmp_path / "other").verify()) == []
    proxy.stop()


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_a_connection_that_stays_lost_ends_in_a_line_and_the_same_command_continues(
    tmp_path, store, registry, place, no_pause, verb
):
    proxy = Proxy(registry.host, for_good=True)
    near = place.replace(registry.host, proxy.host)
    words = ["push", "digits.bn", f"{near}:v1"] if verb == "push" else ["pull", f"{near}:v1", "--store", "other"]
    if verb == "pull":
        document(tmp_path, "store", "push", "digits.bn", f"{place}:v1")
        Store.create(tmp_path / "other")
    proxy.after, proxy.times = 300_000, 1000
    one_line(called(tmp_path, "store", *words), 7, f"{near.removeprefix('oci://')}:v1", "the same command continues")
    if verb == "pull":
        assert Store(tmp_path / "other").artifacts() == []
    else:
        one_line(called(tmp_path, "store", "pull", f"{place}:v1", "x"), 4, "no such artifact")
    proxy.times = 0
    document(tmp_path, "store", *words)
    proxy.stop()


def test_a_tag_with_a_different_digest_is_moved_by_force_only(tmp_path, store, registry, place):
    repository = place.removeprefix(f"oci://{registry.host}/")
    document(tmp_path, "store", "push", "digits", f"{place}:v1")
    document(tmp_path, "store", "push", "digits", f"{place}:v1")
    before = manifest_of(registry, repository, "v1")
    one_line(called(tmp_path, "store", "push", "others", f"{place}:v1"), 2, store.resolve("digits").digest, "--force")
    assert manifest_of(registry, repository, "v1") == before
    one_line(called(tmp_path, "store", "push", "others", f"{place}:v1", "--dry-run"), 2, "--force")
    document(tmp_path, "store", "push", "others", f"{place}:v1", "--force")
    assert sha256(manifest_of(registry, repository, "v1")) == store.resolve("others").digest

    one_line(called(tmp_path, "store", "pull", f"{place}:v1", "digits"), 2, "'digits'", "--force")
    assert store.resolve("digits").digest == sha256(before)
    document(tmp_path, "store", "pull", f"{place}:v1", "digits", "--force")
    assert store.resolve("digits").digest == store.resolve("others").digest
    assert sha256(before) in {artifact.digest for artifact in store.artifacts()}, "the old one stays, without a tag"


def test_a_dry_run_writes_nothing(tmp_path, store, registry, place):
    said = document(tmp_path, "store", "push", "digits", f"{place}:v1", "--dry-run")
    assert (said["dry_run"], len(said["blobs"]), said["artifacts"][0]["there"]) == (True, 3, False)
    one_line(called(tmp_path, "store", "pull", f"{place}:v1"), 4)
    document(tmp_path, "store", "push", "digits", f"{place}:v1")
    said = document(tmp_path, "store", "pull", f"{place}:v1", "--store", "other", "--dry-run")
    assert (said["dry_run"], len(said["blobs"])) == (True, 3)
    assert not (tmp_path / "other").exists()


def test_a_digest_is_an_address_too(tmp_path, store, registry, place):
    document(tmp_path, "store", "push", "digits", f"{place}:v1")
    digest = store.resolve("digits").digest
    pulled = document(tmp_path, "store", "pull", f"{place}@{digest}", "here", "--store", "other")
    assert (pulled["digest"], pulled["tag"]) == (digest, "here")
    one_line(called(tmp_path, "store", "pull", f"{place}@{digest}", "--store", "other"), 2, "has no tag")
    one_line(called(tmp_path, "store", "push", "digits", f"{place}@{digest}"), 2, "under a tag")
    missing = f"{place}@sha256:{'0' * 64}"
    one_line(called(tmp_path, "store", "pull", missing, "here", "--store", "other"), 4, "no such artifact")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("digits:v1", "is not an address"),
        ("https://ghcr.io/me/digits:v1", "is not an address"),
        ("oci://ghcr.io", "is not an address"),
        ("oci://ghcr.io/me/digits", "is not a tag"),
        ("oci://ghcr.io/me/digits:", "is not a tag"),
        ("oci://ghcr.io/me/digits:a/b", "is not a tag"),
        ("oci://ghcr.io/Me/digits:v1", "is not a repository"),
        ("oci://ghcr.io/../digits:v1", "is not a repository"),
        ("oci://ghcr.io//digits:v1", "is not a repository"),
        ("oci://ghcr.io:99999/digits:v1", "is not the name of a registry"),
        ("oci://-x-/digits:v1", "is not the name of a registry"),
        ("oci://ghcr.io/digits@sha256:12", "is not a digest"),
        ("oci://ghcr.io/digits:\x1b[31m", "is not a tag"),
    ],
)
def test_a_malformed_address_is_named(tmp_path, store, address, words):
    for command in (["push", "digits", address], ["pull", address, "x"]):
        one_line(called(tmp_path, "store", *command), 2, words)


def test_an_address_with_a_password_is_not_shown(tmp_path, store):
    done = called(tmp_path, "store", "push", "digits", "oci://me:hunter2@ghcr.io/me/digits:v1")
    one_line(done, 2, "does not contain credentials")
    assert "hunter2" not in done.stderr


def test_what_is_not_there_is_named(tmp_path, store, registry, place, no_pause):
    one_line(called(tmp_path, "store", "pull", f"{place}:v1", "x"), 4, "no such artifact", place.removeprefix("oci://"))
    one_line(called(tmp_path, "store", "push", "dgits", f"{place}:v1"), 4, "did you mean 'digits'?")
    one_line(called(tmp_path, "store", "pull", "oci://localhost:1/me/x:v1", "x"), 7, "localhost:1/me/x:v1: Connection refused")
    one_line(called(tmp_path, "store", "pull", "oci://nowhere.invalid/me/x:v1", "x"), 7, "nowhere.invalid/me/x:v1: ")
    assert set(tags_of(tmp_path)) == {"digits", "digits.bn", "digits.eval", "others"}


def test_https_is_spoken_unless_http_is_asked_for(tmp_path, store, registry, place, no_pause):
    name = "sdpctl.store.address.Address.is_local"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, property(lambda _: False))
        one_line(called(tmp_path, "store", "push", "digits", f"{place}:v1"), 7, "--plain-http")
        document(tmp_path, "store", "push", "digits", f"{place}:v1", "--plain-http")


# Credentials


def docker_config(folder, config):
    path = folder / "home" / ".docker" / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config if isinstance(config, str) else json.dumps(config))


def encoded(password):
    return base64.b64encode(f"{USER}:{password}".encode()).decode()


def test_credentials_come_from_the_configuration_of_clients(tmp_path, store, guarded, monkeypatch):
    place = f"oci://{guarded.host}/me/digits"
    push = ["store", "push", "digits", f"{place}:v1"]
    one_line(called(tmp_path, *push), 7, "wants credentials", f"docker login {guarded.host}")
    docker_config(tmp_path, {"auths": {guarded.host: {"auth": encoded("wrong")}}})
    done = called(tmp_path, *push, SDPCTL_DEBUG="")
    one_line(done, 7, "refuses the credentials", "401")
    assert "wrong" not in done.stderr
    assert encoded("wrong") not in done.stderr
    docker_config(tmp_path, {"auths": {guarded.host: {"auth": encoded(PASSWORD)}}})
    done = called(tmp_path, *push)
    assert done.returncode == 0, done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    assert encoded(PASSWORD) not in done.stdout + done.stderr
    for path in (tmp_path / ".sdpctl").rglob("*"):
        assert path.is_dir() or PASSWORD.encode() not in path.read_bytes()

    (tmp_path / "home" / ".docker" / "config.json").unlink()
    auth = tmp_path / "auth.json"
    auth.write_text(json.dumps({"auths": {f"{guarded.host}/me": {"auth": encoded(PASSWORD)}}}))
    assert called(tmp_path, *push).returncode == 7
    document(tmp_path, *push, REGISTRY_AUTH_FILE=str(auth))
    one_line(called(tmp_path, *[*push[:3], f"oci://{guarded.host}/you/digits:v1"], REGISTRY_AUTH_FILE=str(auth)), 7)
    document(tmp_path, "store", "pull", f"{place}:v1", "x", "--store", "other", REGISTRY_AUTH_FILE=str(auth))


def helper(folder, text):
    program = folder / "docker-credential-tests"
    program.write_text(f"#!{sys.executable}\nimport sys\nhost = sys.stdin.read()\n{text}\n")
    program.chmod(0o755)


@pytest.mark.parametrize("key", ["credsStore", "credHelpers"])
def test_credentials_come_from_helpers(tmp_path, store, guarded, key):
    place = f"oci://{guarded.host}/me/helped"
    push = ["store", "push", "digits", f"{place}:v1"]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    docker_config(tmp_path, {key: "tests" if key == "credsStore" else {guarded.host: "tests"}})
    one_line(called(tmp_path, *push), 7, "docker-credential-tests", "does not work")
    helper(tmp_path, "print('credentials not found in native keychain'); sys.exit(1)")
    one_line(called(tmp_path, *push, **path), 7, "wants credentials")
    helper(tmp_path, "print('secret', file=sys.stderr); sys.exit(3)")
    done = called(tmp_path, *push, **path)
    assert "secret" not in one_line(done, 7, "ended with 3")
    helper(tmp_path, "print('secret')")
    assert "secret" not in one_line(called(tmp_path, *push, **path), 7, "cannot be read")
    helper(tmp_path, 'print(\'{"Username": "<token>", "Secret": "secret"}\')')
    assert "secret" not in one_line(called(tmp_path, *push, **path), 7, "identity token")
    helper(
        tmp_path,
        f'assert host == {guarded.host!r}, host\nprint(\'{{"Username": "{USER}", "Secret": "{PASSWORD}"}}\')',
    )
    document(tmp_path, *push, **path)


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"auths": 3}', '{"auths": {"HOST": {"auth": "%%%"}}}', '{"auths": {"HOST": 3}}']
)
def test_a_damaged_configuration_is_named(tmp_path, store, guarded, config):
    docker_config(tmp_path, config.replace("HOST", guarded.host))
    done = called(tmp_path, "store", "push", "digits", f"oci://{guarded.host}/me/digits:v1")
    one_line(done, 7, ".docker/config.json", "cannot be read")


class TokenRegistry(http.server.BaseHTTPRequestHandler):
    """A registry that wants a bearer token, and hands one out for a password: what Docker Hub and GHCR do."""

    manifest = canonical({"schemaVersion": 2})
    scopes: list[str]
    realm: str | None = None

    def do_GET(self):
        host = f"http://127.0.0.1:{self.server.server_port}"
        authorization = self.headers.get("Authorization", "")
        if self.path.startswith("/token"):
            allowed = authorization == f"Basic {encoded(PASSWORD)}"
            self.scopes += [self.path] if allowed else []
            self.answer(200 if allowed else 401, b'{"token": "t0ken"}' if allowed else b"{}")
        elif authorization != "Bearer t0ken":
            challenge = f'Bearer realm="{self.realm or host + "/token"}",service="tests",scope="repository:me/x:pull"'
            self.answer(401, b"{}", {"Www-Authenticate": challenge})
        else:
            self.answer(200, self.manifest)

    def answer(self, status, content, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def token_registry():
    handler = type("Handler", (TokenRegistry,), {"scopes": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def test_a_token_is_asked_for_and_used(tmp_path, token_registry):
    from sdpctl.errors import ResourceError
    from sdpctl.store.address import Address
    from sdpctl.store.registry import Registry

    host, handler = token_registry
    address = Address.parse(f"oci://{host}/me/x:v1")
    with pytest.raises(ResourceError, match="wants credentials"), Registry(address) as registry:
        registry.manifest("v1")
    docker_config(tmp_path, {"auths": {host: {"auth": encoded(PASSWORD)}}})
    with Registry(address) as registry:
        assert registry.manifest("v1") == (handler.manifest, sha256(handler.manifest))
        assert registry.manifest("v1") is not None
    (asked,) = handler.scopes  # one token serves for all requests
    assert "scope=repository%3Ame%2Fx%3Apull" in asked


@pytest.mark.parametrize("realm", ["nowhere", "file:///etc/passwd", "http://"])
def test_an_odd_realm_is_refused(tmp_path, token_registry, realm, no_pause):
    from sdpctl.errors import ResourceError
    from sdpctl.store.address import Address
    from sdpctl.store.registry import Registry

    host, handler = token_registry
    handler.realm = realm
    address = Address.parse(f"oci://{host}/me/x:v1")
    with pytest.raises(ResourceError, match="^" + re.escape(host)), Registry(address) as registry:
        registry.manifest("v1")


# Strangers


def put(registry, repository, reference, manifest, media_type=MANIFEST_TYPE):
    content = manifest if isinstance(manifest, bytes) else canonical(manifest)
    words = ["curl", "-sf", "-X", "PUT", "-H", f"Content-Type: {media_type}", "--data-binary", "@-"]
    url = f"http://{registry.host}/v2/{repository}/manifests/{reference}"
    subprocess.run([*words, url], input=content, check=True)
    return sha256(content)


def test_a_container_image_is_refused(tmp_path, store, registry, place):
    document(tmp_path, "store", "push", "digits", f"{place}:v1")
    repository = place.removeprefix(f"oci://{registry.host}/")
    manifest = json.loads(manifest_of(registry, repository, "v1"))
    put(registry, repository, "image", manifest | {"artifactType": "application/vnd.example.signature"})
    put(registry, repository, "newer", manifest | {"artifactType": "application/vnd.sdpctl.checkpoint.v2+json"})
    hostile = manifest["layers"][0] | {"annotations": {"org.opencontainers.image.title": "../../x"}}
    put(registry, repository, "hostile", manifest | {"layers": [hostile]})
    one_line(called(tmp_path, "store", "pull", f"{place}:image"), 5, "is not an artifact of sdpctl")
    one_line(called(tmp_path, "store", "pull", f"{place}:newer"), 5, "newer sdpctl")
    one_line(called(tmp_path, "store", "pull", f"{place}:hostile"), 5, "is not a manifest that sdpctl can read")


def test_others_may_attach_what_they_like(tmp_path, store, registry, place):
    document(tmp_path, "store", "push", "digits", f"{place}:v1", "-r")
    repository = place.removeprefix(f"oci://{registry.host}/")
    checkpoint = store.resolve("digits")
    manifest = json.loads(manifest_of(registry, repository, "v1"))
    signature = manifest | {"artifactType": "application/vnd.example.signature", "subject": checkpoint.descriptor.document()}
    digest = put(registry, repository, "signature", signature)
    fallback = checkpoint.digest.replace(":", "-")
    index = json.loads(manifest_of(registry, repository, fallback))
    entry = {"mediaType": MANIFEST_TYPE, "digest": digest, "size": len(canonical(signature))}
    index["manifests"].append(entry | {"artifactType": signature["artifactType"]})
    put(registry, repository, fallback, index, index["mediaType"])
    pulled = document(tmp_path, "store", "pull", f"{place}:v1", "-r", "--store", "other")
    assert [artifact["kind"] for artifact in pulled["artifacts"]] == ["checkpoint", "bn-statistics", "evaluation"]
    document(tmp_path, "store", "push", "digits", f"{place}:v1", "-r")
    assert json.loads(manifest_of(registry, repository, fallback)) == index, "the list of others is kept"

    stranger = put(registry, repository, "stranger", manifest | {"annotations": {"a": "b"}})
    size = len(manifest_of(registry, repository, "stranger"))
    index["manifests"] = [{**entry, "artifactType": manifest["artifactType"], "digest": stranger, "size": size}]
    put(registry, repository, fallback, index, index["mediaType"])
    one_line(called(tmp_path, "store", "pull", f"{place}:v1", "-r", "--store", "third"), 5, stranger, "was not")


@needs("skopeo")
def test_skopeo_reads_what_was_pushed(tmp_path, store, registry, place):
    document(tmp_path, "store", "push", "digits", f"{place}:v1", "-r")
    source = f"docker://{place.removeprefix('oci://')}"
    raw = subprocess.run(
        ["skopeo", "inspect", "--raw", "--tls-verify=false", f"{source}:v1.bn"], capture_output=True, check=True
    ).stdout
    assert sha256(raw) == store.resolve("digits.bn").digest
    for tag in ("v1", "v1.bn"):
        words = ["skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", f"{source}:{tag}", f"oci:copied:{tag}"]
        subprocess.run(words, cwd=tmp_path, capture_output=True, check=True)
    copied = Store(tmp_path / "copied")
    assert copied.resolve("v1.bn").digest == store.resolve("digits.bn").digest
    assert list(copied.verify()) == []


class HostileRegistry(http.server.BaseHTTPRequestHandler):
    """A server that answers every request in the same way."""

    status, content, headers_sent, endless = 200, b"", {}, False

    def do_GET(self):
        self.send_response(self.status)
        headers = {} if self.endless else {"Content-Length": str(len(self.content))}
        for name, value in (headers | self.headers_sent).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(self.content)
        for _ in range(10_000 if self.endless else 0):
            self.wfile.write(bytes(2**16))

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


LIST = b'{"manifests": [], "tags": []}'
HOSTILE = {
    "a page": {"content": b"<html>log in to the hotel</html>"},
    "nothing": {},
    "deep": {"content": b"[" * 100_000},
    "a list": {"content": b"[]"},
    "an index": {"content": canonical({"schemaVersion": 2, "manifests": [], "layers": []})},
    "endless": {"content": b"{", "endless": True},
    "a loop": {"status": 302, "headers_sent": {"Location": "/v2/me/x/manifests/v1"}},
    "a redirect to nowhere": {"status": 302, "headers_sent": {"Location": "http://["}},
    "an error with escapes": {"status": 418, "content": canonical({"errors": [{"message": "\x1b[31mred"}]})},
    "errors without a form": {"status": 400, "content": b'{"errors": [3]}'},
    "busy": {"status": 503},
    "a wrong digest": {"content": LIST, "headers_sent": {"Docker-Content-Digest": "\x1b[31m"}},
    "an odd challenge": {"status": 401, "headers_sent": {"Www-Authenticate": 'Bearer realm="http://["'}},
    "no challenge": {"status": 401},
    "a challenge of an unknown kind": {"status": 401, "headers_sent": {"Www-Authenticate": "Negotiate"}},
    "pages without end": {
        "content": LIST,
        "headers_sent": {"Link": '</v2/me/x/tags/list?n=1>; rel="next"', "Location": "http://["},
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_registry_answers_the_command_ends_with_a_line(tmp_path, store, no_pause, name):
    handler = type("Handler", (HostileRegistry,), HOSTILE[name])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that leaves is no error of the server
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = (store.path / "index.json").read_bytes()
    try:
        for words in (["pull", "ADDRESS", "x"], ["push", "digits.bn", "ADDRESS"], ["push", "digits", "ADDRESS", "--force"]):
            address = f"oci://127.0.0.1:{server.server_port}/me/x:v1"
            done = called(tmp_path, "store", *(address if word == "ADDRESS" else word for word in words))
            assert done.returncode in (2, 4, 5, 7), (words, done.stderr)
            line = one_line(done, done.returncode, f"127.0.0.1:{server.server_port}")
            assert line.isprintable()
    finally:
        server.shutdown()
        server.server_close()
    assert (store.path / "index.json").read_bytes() == before
    assert list((store.path / "tmp").iterdir()) == []


def test_a_missing_client_is_named(tmp_path, store, place, monkeypatch):
    monkeypatch.delitem(sys.modules, "sdpctl.store.registry", raising=False)
    monkeypatch.setitem(sys.modules, "oras", None)
    monkeypatch.setitem(sys.modules, "oras.auth", None)
    one_line(called(tmp_path, "store", "push", "digits", f"{place}:v1"), 7, "pip install 'sdpctl[sharing]'")
