"""The page that measures in a browser: one HTML file with everything in it.

Its sources are in `page/`: a template, a style sheet and JavaScript modules, which become one
script. The network is an ONNX file, run by onnxruntime-web, whose two files come from its npm
package and are checked by their SHA-256. The page's policy allows no connection.
"""

import base64
import gzip
import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from fetal_flax.checkpoints import Checkpoint
from fetal_flax.checkpoints.integrity import digest_of_arrays
from fetal_flax.checkpoints.shipped import LICENCES
from fetal_flax.errors import InputError
from fetal_flax.export.extras import needs
from fetal_flax.measurement.head import OUTLINE_PX

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
_LIBRARY, _WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
_SHA256 = {
    _LIBRARY: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    _WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
_LARGEST_FILE = 2**25

_FOLDER = Path(__file__).with_name("page")
# In this order they are one script: what a module imports stands before it.
_MODULES = ("measurement.js", "drawing.js", "images.js", "csv.js", "network.js", "page.js")


class BrowserRuntime(NamedTuple):
    """The two files of onnxruntime-web that run a network on a CPU."""

    library: bytes
    """JavaScript module."""
    wasm: bytes
    """What it runs."""


def browser_runtime(source: Path | None = None) -> BrowserRuntime:
    """Returns onnxruntime-web's files, checked.

    Args:
        source: The npm package: the file that `npm pack` makes, or the folder of its contents.
            Without it npm fetches the package.

    Raises:
        InputError: It is another version, can't be read, or npm can't fetch it.
    """
    if source is None:
        return _fetched()
    try:
        found = {name: _read(source, name) for name in _SHA256}
    except (OSError, KeyError, tarfile.TarError, EOFError) as error:
        raise InputError(
            f"--onnxruntime-web {source} can't be read ({error}): give what "
            f"`npm pack {PACKAGE}@{VERSION}` makes, or its unpacked folder"
        ) from None
    for name, content in found.items():
        if hashlib.sha256(content).hexdigest() != _SHA256[name]:
            raise InputError(
                f"--onnxruntime-web {source} holds another {name} than {PACKAGE} {VERSION}: give "
                f"what `npm pack {PACKAGE}@{VERSION}` makes"
            )
    return BrowserRuntime(found[_LIBRARY], found[_WASM])


def _read(source: Path, name: str) -> bytes:
    """Returns a file of the package, as a folder or as npm packs it."""
    if source.is_dir():
        return (source / "dist" / name).read_bytes()
    with tarfile.open(source, "r:gz") as archive:
        file = archive.extractfile(f"package/dist/{name}")
        if file is None:
            raise KeyError(f"{name} is no file in it")
        return file.read(_LARGEST_FILE)


def _fetched() -> BrowserRuntime:
    npm = shutil.which("npm")
    by_hand = (
        f"run `npm pack {PACKAGE}@{VERSION}` where npm and its registry are, and give the file as "
        "--onnxruntime-web"
    )
    if npm is None:
        raise InputError(f"the page needs {PACKAGE}, and there is no npm to fetch it: {by_hand}")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", f"{PACKAGE}@{VERSION}"]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        packed = next(Path(folder).glob("*.tgz"), None)
        if ran.returncode or packed is None:
            raise InputError(f"npm could not fetch {PACKAGE} {VERSION}: {by_hand}")
        return browser_runtime(packed)


def write_page(checkpoint: Checkpoint, model: bytes, runtime: BrowserRuntime, path: Path) -> None:
    """Writes the page that measures with a network.

    Args:
        checkpoint: The network.
        model: The same as an ONNX file, for uint8 images of its own size.
        runtime: What runs it.
        path: The HTML file.

    Raises:
        InputError: onnxruntime isn't there, whose licences the page has.
    """
    needs("onnx", "onnxruntime")
    path.write_text(_page(checkpoint, model, runtime), encoding="utf-8", newline="\n")


def network_in_page(path: Path) -> bytes:
    """Returns the ONNX file that a page holds."""
    block = re.search(r'id="network">([^<]+)<', path.read_text(encoding="utf-8"))
    assert block is not None
    return gzip.decompress(base64.b64decode(block[1]))


def page_script() -> str:
    """Returns the page's modules as one: without imports and exports, which have no place then."""
    source = "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in _MODULES)
    source = re.sub(r"^import .* from .*;\n", "", source, flags=re.MULTILINE)
    return re.sub(r"^export ", "", source, flags=re.MULTILINE)


def _page(checkpoint: Checkpoint, model: bytes, runtime: BrowserRuntime) -> str:
    description = checkpoint.metadata
    settings = {
        "imageSize": list(checkpoint.image_size),
        "outlinePx": OUTLINE_PX[description.dataset],
        "channels": checkpoint.config.in_channels,
    }
    script = page_script()
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.jinja").render(
        policy=_policy(script, style),
        script=Markup(script),
        style=Markup(style),
        settings=settings,
        settings_json=Markup(json.dumps(settings)),
        blocks={
            "library": _packed(runtime.library),
            "wasm": _packed(runtime.wasm),
            "network": _packed(model),
            "notices": _packed(_onnxruntime_text("ThirdPartyNotices.txt").encode()),
        },
        network=description.title,
        digest=digest_of_arrays(checkpoint.variables._asdict()),
        weights_licence=LICENCES[description.dataset],
        version=importlib.metadata.version("fetal_flax"),
        runtime_version=VERSION,
        runtime_licence=_onnxruntime_text("LICENSE"),
    )


def _policy(script: str, style: str) -> str:
    """Returns the page's Content-Security-Policy: no connections, and no code but its own.

    The runtime's library is a module that the page makes of its own text, hence `blob:`.
    """
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_source_hash(script)}' 'wasm-unsafe-eval' blob:",
            f"style-src '{_source_hash(style)}'",
            "img-src blob: data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _source_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def _onnxruntime_text(name: str) -> str:
    """Returns a licence text of onnxruntime, which its Python package brings."""
    folder = importlib.metadata.distribution("onnxruntime").locate_file("onnxruntime")
    return (Path(str(folder)) / name).read_text(encoding="utf-8", errors="replace")
