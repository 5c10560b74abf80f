"""MkDocs hook: makes the pages of the site that are not written in docs/.

README.md, CONTRIBUTING.md, CHANGELOG.md and the model cards are taken as they are, examples/ and
configs/ as listings, and the reference of the commands from what `--help` prints. Links that lead
out of docs/ on GitHub lead to these pages.
"""

import contextlib
import io
import logging
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import fetal_flax
from fetal_flax.checkpoints import shipped
from fetal_flax.commands import main

ROOT = Path(__file__).parents[1]
COPIES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    **{f"fetal_flax/networks/{name}/MODEL_CARD.md": f"cards/{name}.md" for name in shipped.names()},
}
"""Files of the repository, and the pages that they become."""
LISTINGS = {
    "examples": ("examples.md", "Examples", "Programs to begin with; the tests run them."),
    "configs": (
        "presets.md",
        "Presets",
        "Each is a file that `fetal-flax train NAME` takes by its name, and a model for "
        "[your own](own-data.md#settings).",
    ),
}
HELP_COLUMNS = "100"
"""At this width `--help` prints one column of boxes; into a pipe, it draws them in ASCII."""
_LONG_NAME = re.compile(r"[\w./]{25,}")
_WHOLE = re.compile(r"--\w+|\b\d[\d.]*e-\d+\b|\b\d{4}-\d\d-\d\d\b")
_LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    pages = {page: (ROOT / source).read_text("utf-8") for source, page in COPIES.items()}
    for folder, (page, title, opening) in LISTINGS.items():
        pages[page] = "\n".join([f"# {title}\n", opening, *_listing(ROOT / folder)])
    pages["commands.md"] = "\n".join(_commands())
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links within the repository into links within the site."""
    here = page.file.src_uri
    if here == "reference.md":
        _check_reference(markdown)
    source = {made: name for name, made in COPIES.items()}.get(here, f"docs/{here}")

    def within_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        top = target.split("/")[0]
        if target in COPIES:
            to = COPIES[target]
        elif top in LISTINGS:
            to = LISTINGS[top][0]
        elif top == "docs":
            to = target.removeprefix("docs/")
        else:
            return match[0]
        return match[1] + posixpath.relpath(to, posixpath.dirname(here) or ".") + match[3]

    generated = here in {page for page, *_ in LISTINGS.values()}
    return markdown if generated else _LINK.sub(within_site, markdown)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Says where lines may end: in a long name, but not in a number, a date or after dashes."""
    parts = re.split(r"(<[^>]+>)", html)  # Every other part is a tag.
    in_block = False
    for number, part in enumerate(parts):
        if number % 2:
            in_block = part == "<pre>" or (in_block and part != "</pre>")
            continue
        text = part if in_block else _LONG_NAME.sub(_breakable, part)
        parts[number] = _WHOLE.sub(r'<span class="whole">\g<0></span>', text)
    return "".join(parts)


def _breakable(name: re.Match[str]) -> str:
    after = "/" if "/" in name[0] else "_"
    return re.sub(rf"(?<=\w){after}(?=\w)", rf"{after}<wbr>", name[0])


def _check_reference(markdown: str) -> None:
    """Warns, which fails a strict build, of names that the reference lacks."""
    names = set(re.findall(r"^::: fetal_flax\.(\w+)$", markdown, re.MULTILINE))
    missing = set(fetal_flax.__all__) - names - {"__version__"}
    if missing:
        log.warning("docs/reference.md lacks %s", ", ".join(sorted(missing)))


def _listing(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.py")):
        yield f"\n## {path.stem}\n\n```python\n{path.read_text('utf-8').strip()}\n```"


def _commands() -> Iterator[str]:
    yield "# Commands\n"
    yield (
        "What `fetal-flax COMMAND --help` prints. Errors are one sentence on stderr; the exit code "
        "is 0 for done, 1 for a run that can't go on, 2 for bad input, and 75 for a training that "
        "was asked to stop and can be resumed.\n"
    )
    shown: set[str] = set()
    for name in main.COMMANDS:
        usage, about, *boxes = re.split(r"\n\s*\n", _help(name).strip())
        yield f"## {name}\n\n{' '.join(about.split())}\n"
        yield f"    {' '.join(usage.split()).removeprefix('usage: ')}\n"
        for box in boxes:
            if box not in shown:
                yield from _box(box)
        if not shown.isdisjoint(boxes):
            yield "The other options, which set up the run, are those of [train](#train).\n"
        shown.update(boxes)


def _help(name: str) -> str:
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS=HELP_COLUMNS, NO_COLOR="1"),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main.parse(name, ["--help"])
    return printed.getvalue()


def _box(box: str) -> Iterator[str]:
    """Turns a box of flags into a table."""
    title, *lines = box.splitlines()
    about, rows = "", []
    for line in lines:
        text = line.strip()
        if text.startswith(("-", "[")) and not line.startswith("   ") and text.strip("-"):
            rows.append(re.split(r"\s{2,}", text, maxsplit=1))
        elif rows:
            rows[-1] = [rows[-1][0], " ".join([*rows[-1][1:], text])]
        else:
            about += text.strip("-")
    yield f"**{title.strip()}** {about}\n\n| flag | what |\n|---|---|"
    for flag, text in rows:
        what = re.sub(r"(?<![`\w-])--\w[\w.-]*\w", r"`\g<0>`", text)
        # A long list of values breaks where there is a space.
        yield f"| `{re.sub(r',(?! )', ', ', flag)}` | {what} |"
    yield ""
