"""Keep what the notebooks printed, so that the book need not run them again.

    python scripts/keep_outputs.py EXECUTED CACHE

EXECUTED is a folder of executed notebooks, CACHE the cache of `jupyter-cache`
in which MyST-NB looks before it executes a page. The key of an entry is the
code of the page: one that differs is not found, and the page is executed.
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn

CHAPTERS = Path(__file__).parents[1] / "book/chapters"


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def page_with_outputs(executed: Path) -> nbformat.NotebookNode:
    """The chapter as its page reads it, with the outputs of its notebook.

    The notebook begins with one cell more, which installs the package.
    """
    page = jupytext.read(CHAPTERS / f"{executed.stem}.md")
    page.metadata.pop("jupytext")
    notebook = nbformat.read(executed, as_version=4)
    page.metadata.language_info = notebook.metadata.language_info
    ran = code_cells(notebook)[1:]
    for number, (cell, done) in enumerate(zip(code_cells(page), ran, strict=True), 1):
        if cell.source != done.source:
            sys.exit(f"{executed}: cell {number} is not the chapter's: make sync")
        cell.outputs, cell.execution_count = done.outputs, number
    return page


def main() -> None:
    executed, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    cache = get_cache(folder)
    for path in sorted(executed.glob("*.ipynb")):
        page = CacheBundleIn(page_with_outputs(path), str(path))
        cache.cache_notebook_bundle(page, overwrite=True)


if __name__ == "__main__":
    main()
