"""A real registry for tests: Debian's docker-registry in a temporary folder, and a proxy before it that loses connections."""

import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

USER, PASSWORD = "reader", "correct horse"
HTPASSWD = f"{USER}:$2y$05$abcdefghijklmnopqrstuuHNbAKRhpaujgo33bRWs.NLUTJO3lOy2\n"
"""The password, hashed by bcrypt, the only hash that docker-registry takes."""

CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""
PROGRAM = shutil.which("docker-registry")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RegistryProcess:
    """A running registry.

    Args:
        folder: folder of its configuration and its storage.
        password: ask for the password.
    """

    def __init__(self, folder: Path, *, password: bool = False) -> None:
        self.folder, port = folder, free_port()
        self.host = f"127.0.0.1:{port}"
        text = CONFIG.format(folder=folder / "storage", port=port)
        if password:
            (folder / "htpasswd").write_text(HTPASSWD)
            text += f"auth: {{htpasswd: {{realm: tests, path: {folder / 'htpasswd'}}}}}\n"
        (folder / "config.yml").write_text(text)
        assert PROGRAM is not None, "docker-registry is not installed"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen([PROGRAM, "serve", folder / "config.yml"], stdout=log, stderr=log, env=environment)
        for _ in range(200):
            if self._answers():
                return
            assert self._process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        raise AssertionError("the registry does not answer")

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"http://{self.host}/v2/", timeout=5).close()
        except urllib.error.HTTPError:
            return True  # it wants a password
        except OSError:
            return False
        return True

    def blob(self, digest: str) -> Path:
        """Return the file in which the registry has a blob."""
        hexadecimal = digest.removeprefix("sha256:")
        return self.folder / "storage/docker/registry/v2/blobs/sha256" / hexadecimal[:2] / hexadecimal / "data"

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@contextmanager
def running(folder: Path, *, password: bool = False) -> Iterator[RegistryProcess]:
    registry = RegistryProcess(folder, password=password)
    try:
        yield registry
    finally:
        registry.stop()


class Proxy:
    """A proxy that closes a connection after a number of bytes, a number of times; it counts the bytes that it passes on.

    Args:
        host: address of the registry.
        after: bytes in one direction after which a connection is closed.
        times: how many connections are closed.
        for_good: after the first one, let no byte through any more.
    """

    def __init__(self, host: str, *, after: int = 2**62, times: int = 0, for_good: bool = False) -> None:
        self._target, self.after, self.times = host.split(":"), after, times
        self.for_good = for_good
        self.passed = {"up": 0, "down": 0}
        self._server = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._lock = threading.Lock()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            registry = socket.create_connection((self._target[0], int(self._target[1])))
            for way, source, sink in (("up", client, registry), ("down", registry, client)):
                threading.Thread(target=self._pass_on, args=(way, source, sink), daemon=True).start()

    def _pass_on(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        done = 0
        try:
            while piece := source.recv(2**14):
                done += len(piece)
                with self._lock:
                    cut = done > self.after and self.times > 0
                    self.times -= cut
                    self.after = 0 if cut and self.for_good else self.after
                    self.passed[way] += 0 if cut else len(piece)
                if cut:
                    break
                sink.sendall(piece)
        except OSError:
            pass  # the other direction closed the connection
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def stop(self) -> None:
        self._server.close()
