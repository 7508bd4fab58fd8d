"""Sphinx extension: how this book shows its `export` and `check` cells.

A cell tagged `check` is folded under the word "Check". Under a cell
tagged `export` stands the module it becomes part of, linked to the line
of the generated file in the repository. A cell of imports has no such
line: its imports go to the heads of the modules that use them.
"""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

MARK = re.compile(r"# %% (\S+), cell (\d+)$")


def find_lines(package: Path) -> dict[tuple[str, int], tuple[str, int]]:
    """Where each exported cell starts: (chapter, cell) -> (module, line)."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if match := MARK.match(line):
                cell = match[1], int(match[2])
                inside = path.relative_to(package.parent).as_posix()
                found[cell] = inside, number
    return found


def code_cells(doctree: nodes.document) -> list[nodes.container]:
    """The code cells of a page, in order."""
    return [
        node
        for node in doctree.findall(nodes.container)
        if node.get("nb_element") == "cell_code"
    ]


def fold(cell: nodes.container) -> None:
    """Hide a cell behind the summary "Check"."""
    output = cell.children[-1].get("nb_element") == "cell_code_output"
    cell["hide_mode"] = "all" if output else "input"
    cell["prompt_show"] = cell["prompt_hide"] = "Check"


def link(cell: nodes.container, path: str, line: int, tree: str) -> None:
    """Put a link to the generated line under the source of a cell."""
    reference = nodes.reference(
        "", "", nodes.literal("", path), refuri=f"{tree}/{path}#L{line}"
    )
    paragraph = nodes.paragraph("", "", reference, classes=["exported"])
    cell.insert(1, paragraph)


def mark_cells(app: Sphinx, doctree: nodes.document) -> None:
    """Fold the checks and link the exports of one page."""
    options = app.config.html_theme_options
    branch = options.get("repository_branch", "main")
    tree = f"{options.get('repository_url', '')}/blob/{branch}"
    chapter = f"{app.env.docname}.md"
    found = find_lines(Path(app.srcdir) / "annotated_moe")
    for number, cell in enumerate(code_cells(doctree), 1):
        tags = cell["cell_metadata"].get("tags", [])
        if "check" in tags:
            fold(cell)
        if "export" in tags and (chapter, number) in found:
            link(cell, *found[chapter, number], tree)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("doctree-read", mark_cells)
    return {"version": "1", "parallel_read_safe": True}
