"""mkdocs: pages link to files outside docs/ as they do on any code host; the site gets those files along.

`../training/config.py` becomes a page with its source, `../benchmarks/README.md` a page, a folder a list of its files, a
picture a picture. A link to something that does not exist is left as it is, and ends a strict build.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".h": "cpp", ".cpp": "cpp"}
BINARY = {".png", ".svg"}


def outside(text: str) -> set[str]:
    """Paths, from the root of the repository, of what a page links to outside docs/."""
    return {path for path, _ in LINK.findall(text) if (ROOT / path).exists()}


def place(path: str) -> str:
    """Where it stands in the site's sources."""
    suffix = Path(path).suffix
    return f"source/{path}" if suffix in BINARY | {".md"} else f"source/{path}.md"


def on_files(files, config):
    linked = set()
    for file in list(files.documentation_pages()):
        linked |= outside(file.content_string)
    for path in sorted(linked):
        suffix = Path(path).suffix
        if suffix in BINARY:
            made = File.generated(config, place(path), content=(ROOT / path).read_bytes())
        elif suffix == ".md":
            text = re.sub(
                r"\]\((?!https?:|#)[^)]*\)", "]", (ROOT / path).read_text()
            )  # its own links lead nowhere here
            made = File.generated(config, place(path), content=text)
        elif (ROOT / path).is_dir():
            names = sorted(each.name for each in (ROOT / path).iterdir() if not each.name.startswith(("__", ".")))
            made = File.generated(config, place(path), content="\n".join([f"# {path}\n", *(f"- {n}" for n in names)]))
        else:
            code = (ROOT / path).read_text()
            text = f"# {path}\n\n````{LANGUAGES.get(suffix, '')}\n{code}````\n"
            made = File.generated(config, place(path), content=text)
        made.inclusion = made.inclusion.__class__.NOT_IN_NAV
        files.append(made)
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri.startswith("source/"):
        return markdown
    return LINK.sub(
        lambda m: f"]({place(m[1])}{m[2] or ''})" if (ROOT / m[1]).exists() else m[0],
        markdown,
    )
