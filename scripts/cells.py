"""Run the first cells of a chapter, for scripts that train what it describes."""

from pathlib import Path
from typing import Any

from annotated_moe import tangle

ROOT = Path(__file__).parent.parent


def names_before(chapter: str, label: str) -> dict[str, Any]:
    """The names that a chapter has where `label` stands in it."""
    path = ROOT / chapter
    lines = path.read_text(encoding="utf-8").splitlines()
    end = lines.index(f"({label})=")
    names: dict[str, Any] = {}
    for cell in tangle.read_file(chapter, path).cells:
        if cell.line < end and "check" not in cell.tags:
            source = tangle.without_magics(cell.source)
            exec(compile(source, f"{chapter}:{cell.line}", "exec"), names)
    return names
