"""The pages as a site: every link leads somewhere, and nothing is fetched when it is read."""

import re

import pytest

from tools.environment import ROOT

mkdocs = pytest.importorskip("mkdocs.commands.build", reason="mkdocs comes with make install")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(
            str(ROOT / "mkdocs.yml"), site_dir=str(folder)
        )  # strict: a broken link is an error
        mkdocs.build(config)
    return folder


def test_every_page_is_in_the_menu(site):
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in menu
        assert (site / page.with_suffix(".html").name).is_file()
    first = (site / "index.html").read_text(encoding="utf-8")
    for part in ("Start", "Use", "Understand", "Develop"):
        assert part in first


def test_links_out_of_the_pages_folder_lead_to_the_same_place_in_the_site(site):
    text = (site / "ops.html").read_text(encoding="utf-8")
    assert 'href="src/nl_kernels/ops/delta_memory/index.html"' in text
    example = (site / "examples/minimal/index.html").read_text(encoding="utf-8")
    (link,) = set(re.findall(r'href="(delta_memory\.py)"', example))
    assert (site / "examples/minimal" / link).read_bytes() == (ROOT / "examples/minimal" / link).read_bytes()


def test_nothing_is_fetched_when_it_is_read(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="?([^" >]+)', text)
        loaded += re.findall(r'<link[^>]* rel="?(?:stylesheet|preconnect|icon)"?[^>]*href="?([^" >]+)', text)
        assert loaded
        assert not [address for address in loaded if "//" in address], page
