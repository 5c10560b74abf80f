import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fetal_flax._util import download
from fetal_flax.errors import InputError

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Any

    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path == "/missing":
            self.send_error(404)
            return
        if self.path == "/silent":
            self.server.release.wait(5)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:1000] if self.path == "/cut" else CONTENT)

    def log_message(self, *_):
        pass


class _Server(http.server.ThreadingHTTPServer):
    requests: list[str]
    release: threading.Event

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.requests, server.release = [], threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


def test_fetches_once(server: _Server, tmp_path: Path):
    destination = tmp_path / "new" / "file.bin"
    for _ in range(2):
        path = download.fetch(server.url("/file"), destination, sha256=SHA256, size=len(CONTENT))
    assert path == destination
    assert destination.read_bytes() == CONTENT
    assert server.requests == ["/file"]
    assert [p.name for p in destination.parent.iterdir()] == ["file.bin"]


def test_first_digits_of_the_hash_are_not_enough(server: _Server, tmp_path: Path):
    with pytest.raises(InputError, match="SHA-256"):
        download.fetch(server.url("/file"), tmp_path / "a", sha256=SHA256[:8])


def test_a_wrong_file_is_replaced(server: _Server, tmp_path: Path):
    destination = tmp_path / "file.bin"
    destination.write_bytes(CONTENT[:-1])
    download.fetch(server.url("/file"), destination, sha256=SHA256)
    assert destination.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "size", "reason"),
    [
        ("/missing", None, "Not Found"),
        ("/cut", len(CONTENT), "gave 1000 bytes instead of"),
        ("/file", len(CONTENT) + 1, "bytes instead of"),
        ("/silent", None, "timed out"),
    ],
)
def test_failures_name_file_and_way_out(
    server: _Server, tmp_path: Path, monkeypatch, path: str, size: int | None, reason: str
):
    if path == "/silent":
        monkeypatch.setattr(download, "_TIMEOUT_SECONDS", 0.3)
    destination = tmp_path / "file.bin"
    with pytest.raises(InputError) as error:
        download.fetch(server.url(path), destination, sha256=SHA256, size=size)
    for part in (server.url(path), reason, f"by hand to {destination}"):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_no_server(tmp_path: Path):
    with pytest.raises(InputError, match=r"Connection refused.*by hand"):
        download.fetch("http://127.0.0.1:9/file", tmp_path / "file.bin", sha256=SHA256)


def test_destination_that_cannot_be_written(server: _Server, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="can't write"):
        download.fetch(server.url("/file"), tmp_path / "file" / "x", sha256=SHA256)
