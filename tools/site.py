"""Hooks of mkdocs: the site has the project's folders, so that links work as they do in the repository.

docs/ is the site's root and README.md its first page. Whatever a page links to beside them comes in at its
own path: pages as pages, everything else as the file that it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(\]\()([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md and all that pages lead to."""
    waiting = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        if files.get_file_from_path(_place(path)) is None:
            files.append(File.generated(config, _place(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            links = _LINK.findall(path.read_text(encoding="utf-8"))
            waiting += [_target(path, link) for _, link in links if "://" not in link]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository as links of the site."""
    source = Path(page.file.abs_src_path)

    def moved(match: re.Match[str]) -> str:
        target = _target(source, match[2])
        if "://" in match[2] or not target.is_file():  # of what leads nowhere mkdocs complains
            return match[0]
        place = _place(target)
        return match[1] + Path(os.path.relpath(place, Path(page.file.src_uri).parent)).as_posix()

    return _LINK.sub(moved, markdown)


def _target(page: Path, link: str) -> Path:
    return Path(os.path.normpath(page.parent / link))


def _place(path: Path) -> str:
    """Where a file of the repository lies in the site."""
    place = path.relative_to(ROOT)
    if place == Path("README.md"):
        return "index.md"
    return place.relative_to("docs").as_posix() if place.parts[0] == "docs" else place.as_posix()
