"""Links from the pages to files of the repository that are no pages: they are checked, and work in the built site.

mkdocs knows the files below docs/ only. A link that leaves docs/ is looked up in the repository: a file is copied into
the site, below repository/ (text as .txt, which every browser shows), a folder becomes plain text with its path.
A link to what does not exist is left to mkdocs, which warns of it.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit
from xml.etree import ElementTree

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

SHOWN_AS_THEY_ARE = {".gif", ".gz", ".jpg", ".json", ".pdf", ".png", ".svg"}


class RepositoryLinks(Treeprocessor, Extension):
    """Runs before mkdocs' own check of links, on the page that was announced last."""

    def __init__(self, config: MkDocsConfig) -> None:
        super().__init__()
        self.config = config
        self.docs = Path(config.docs_dir).resolve()
        self.root = self.docs.parent
        self.page: Page
        self.files: Files

    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(self, "repository_links", 1)  # mkdocs' has priority 0

    def run(self, root: ElementTree.Element) -> None:
        for element in root.iter():
            if (key := {"a": "href", "img": "src"}.get(element.tag)) and (url := element.get(key)):
                self._see(element, key, url)

    def _see(self, element: ElementTree.Element, key: str, url: str) -> None:
        link = urlsplit(url)
        if link.scheme or link.netloc or not link.path or link.path.startswith("/"):
            return
        source = self.page.file.src_uri
        target = (self.docs / source).parent.joinpath(unquote(link.path)).resolve()
        if not target.is_relative_to(self.root) or not target.exists():
            return
        if target.is_relative_to(self.docs):  # mkdocs' own, also where the way there leaves docs/
            uri = target.relative_to(self.docs).as_posix()
            element.set(key, urlunsplit(link._replace(path=get_relative_url(uri, source))))
            return
        path = target.relative_to(self.root).as_posix()
        if target.is_dir():
            element.tag = "span"
            del element.attrib[key]
        else:
            copy = self._copied(target, path)
            relative = get_relative_url(copy.src_uri, source)
            element.set(key, urlunsplit(link._replace(path=relative)))
        if "title" not in element.attrib:
            element.set("title", path)

    def _copied(self, target: Path, path: str) -> File:
        suffix = "" if target.suffix in SHOWN_AS_THEY_ARE else ".txt"
        uri = f"repository/{path}{suffix}"
        copy = self.files.get_file_from_path(uri)
        if copy is None:
            copy = File.generated(self.config, uri, abs_src_path=str(target))
            self.files.append(copy)
        return copy


def on_config(config: MkDocsConfig) -> None:
    config.markdown_extensions.append(RepositoryLinks(config))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    for extension in config.markdown_extensions:
        if isinstance(extension, RepositoryLinks):
            extension.page, extension.files = page, files
