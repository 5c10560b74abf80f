import hashlib
import http.server
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest

from fetal_flax.data import hc18
from fetal_flax.data.hc18 import zenodo
from fetal_flax.errors import InputError


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_downloads_and_unpacks_once(tiny_hc18: Path, tmp_path: Path, monkeypatch):
    archive = tiny_hc18 / f"{hc18.IMAGES}.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in sorted((tiny_hc18 / hc18.IMAGES).iterdir()):
            zipped.write(path, f"{hc18.IMAGES}/{path.name}")
    files = {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in (archive, tiny_hc18 / hc18.CSV)
    }
    monkeypatch.setattr(zenodo, "_FILES", files)
    handler = partial(_Quiet, directory=str(tiny_hc18))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(zenodo, "_URL", f"http://127.0.0.1:{server.server_address[1]}/{{}}")
        folder = hc18.download(tmp_path / "cache")
        server.shutdown()
        thread.join()
    assert len(hc18.find_records(folder)) == 6
    assert hc18.download(tmp_path / "cache") == folder  # The server is gone.


def test_failed_download_says_how_to_do_without(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(zenodo, "_URL", "http://127.0.0.1:9/{}")
    with pytest.raises(
        InputError, match=r"name that folder .train: --data\.data-dir, evaluate: --data-dir"
    ):
        hc18.download(tmp_path)
