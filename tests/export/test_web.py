"""How the page is put together; what it does is in test_page.py."""

import base64
import hashlib
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from fetal_flax.checkpoints import Checkpoint, Description
from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
from fetal_flax.export import ExportSettings, to_file, web
from fetal_flax.models import functional

pytestmark = pytest.mark.usefixtures("quick_compilation")

FILES = {"ort.wasm.bundle.min.mjs": b"export default 1;", "ort-wasm-simd-threaded.wasm": b"\0asm"}


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Iterator[Path]:
    """A folder like the npm package's, whose digests are taken to be right."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "dist").mkdir()
    digests = {}
    for name, content in FILES.items():
        (folder / "dist" / name).write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    with mock.patch.object(web, "_SHA256", digests):
        yield folder


@pytest.fixture(scope="module")
def page(package, tmp_path_factory) -> Path:
    config = ModelConfig(name="unet", base_width=4)
    description = Description("network", config, (32, 48))
    path = tmp_path_factory.mktemp("page") / "measure.html"
    report = to_file(
        Checkpoint(functional.init(config, seed=0), description),
        path,
        format="web",
        settings=ExportSettings(onnxruntime_web=package),
        images=2,
    )
    [comparison] = report.comparisons.values()
    assert comparison.logit_difference < 1e-4
    return path


def test_the_runtime_comes_from_a_folder_or_from_what_npm_packs(package, tmp_path):
    expected = web.BrowserRuntime(*FILES.values())
    assert web.browser_runtime(package) == expected
    packed = tmp_path / "package.tgz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(package, "package")
    assert web.browser_runtime(packed) == expected


def test_another_runtime_is_refused(package, tmp_path):
    changed = shutil.copytree(package, tmp_path / "changed")
    (changed / "dist" / "ort-wasm-simd-threaded.wasm").write_bytes(b"another")
    with pytest.raises(InputError, match=r"another ort-wasm\S+ than onnxruntime-web 1\.\d+\.0"):
        web.browser_runtime(changed)
    no_archive = tmp_path / "package.tgz"
    no_archive.write_bytes(b"none")
    for source in (tmp_path / "nowhere", tmp_path, no_archive):
        with pytest.raises(InputError, match=r"can't be read .*npm pack onnxruntime-web@"):
            web.browser_runtime(source)


def test_without_npm_the_way_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no npm to fetch it: run `npm pack"):
        web.browser_runtime()
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(InputError, match="npm could not fetch onnxruntime-web"):
        web.browser_runtime()


def test_the_policy_allows_the_page_s_own_code_and_no_connection(page):
    html = page.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    allowed = policy[1].replace("&#39;", "'")
    assert allowed.startswith("default-src 'none'; ")
    assert not re.search(r"connect-src|http|\*|'unsafe-", allowed)
    for directive, tag in (("script-src", "script type=module"), ("style-src", "style")):
        found = re.search(rf"<{tag}>(.*?)</".replace("=module", '="module"'), html, re.DOTALL)
        assert found is not None
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in allowed


def test_the_page_names_no_address(page):
    html = page.read_text()
    assert set(re.findall(r'(?:href|src)="([^"]*)"', html)) == {"#files", "data:,"}
    assert not re.search(r"\burl\(|\bfetch\(|XMLHttpRequest|WebSocket|sendBeacon", html)
    assert "://" not in html


def test_the_page_carries_its_licences(page):
    html = page.read_text()
    assert "Copyright (c) Microsoft Corporation" in html
    assert "Permission is hereby granted, free of charge" in html
    assert "Apache-2.0" in html and "CC BY 4.0" in html


def test_the_modules_become_one_script():
    script = web.page_script()
    assert not re.search(r"^(import|export)\b", script, re.MULTILINE)
    assert "</script" not in script
    declared = re.findall(r"^(?:async )?(?:function|const|let) (\w+)", script, re.MULTILINE)
    assert len(declared) == len(set(declared)) > 40
