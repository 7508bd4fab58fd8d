"""The house: the form of every page, and what must agree across files."""

import ast
import contextlib
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from annotated_moe import tangle

yaml = pytest.importorskip("yaml")

REPOSITORY = Path(__file__).parent.parent
CHAPTERS = sorted(REPOSITORY.glob("book/chapters/*.md"))
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def only_imports(source: str) -> bool:
    """A list of names is no code that one has to follow."""
    with contextlib.suppress(SyntaxError):
        body = ast.parse(source).body
        return all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)
    return False


def one_thought(cell: tangle.Cell) -> bool:
    """A class or function with what registers it, or a few small ones."""
    if "export" not in cell.tags:
        return False
    kinds = [type(node) for node in ast.parse(cell.source).body]
    longer = kinds.count(ast.ClassDef) + kinds.count(ast.FunctionDef)
    return cell.source.count("\n") < (115 if longer <= 1 else 45)


def read(path: Path) -> tangle.Chapter:
    return tangle.read_file(path.relative_to(REPOSITORY).as_posix(), path)


# These appendices are for looking things up.
LOOKED_UP = "92", "93", "94", "95", "96", "97", "98", "99"
TAUGHT = [p for p in CHAPTERS if not p.stem.startswith(LOOKED_UP)]


@each_chapter
def test_code_is_narrow_and_cells_are_short(path):
    chapter = read(path)
    lengths = []
    for cell in chapter.cells:
        lines = cell.source.split("\n")
        lengths.append(sum(bool(line.strip()) for line in lines))
        for number, line in enumerate(lines, cell.line):
            assert len(line) <= 72, f"{chapter.path}:{number}: {len(line)} columns"
        short = len(lines) <= 30 or only_imports(cell.source) or one_thought(cell)
        assert short, f"{chapter.path}:{cell.line}: {len(lines)} lines"
    assert path not in TAUGHT or sorted(lengths)[len(lengths) // 2] < 13


@pytest.mark.parametrize("path", TAUGHT, ids=lambda path: path.stem)
def test_a_chapter_has_all_its_parts(path):
    text, chapter = path.read_text(encoding="utf-8"), read(path)
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["jupytext"]["formats"] == "md:myst,ipynb"
    assert header["kernelspec"] == {"display_name": "Python 3", "name": "python3"}
    assert re.search(r"^\(.+\)=\n# ", text, re.MULTILINE), "a label above the title"
    assert ":class: departure" in text
    assert sum("check" in cell.tags for cell in chapter.cells) >= 3
    exercises = re.findall(r"^:label: (ex-\S+)", text, re.MULTILINE)
    solutions = re.findall(r"\{solution-start\} (\S+)", text)
    assert len(exercises) >= 3 and sorted(exercises) == sorted(solutions)
    assert text.count(":class: dropdown") == len(solutions)


@each_chapter
def test_figures_have_a_caption_and_alternative_text(path):
    names, drawings = [], 0
    for fence in tangle.fences(path.name, path.read_text("utf-8").splitlines()):
        drawings += fence.info.split()[:1] == ["{figure}"]
        if fence.info.split()[:1] != ["{code-cell}"]:
            continue
        options, _ = tangle.split_options(fence.body)
        shown = (yaml.safe_load(options) or {}).get("mystnb", {})
        draws = re.search(r"\bplt\.subplots", "\n".join(fence.body))
        assert not draws or shown, f"{path.name}:{fence.line}: a figure without words"
        if shown:
            names.append(shown["figure"]["name"])
            assert names[-1].startswith("fig-")
            assert shown["figure"]["caption"].rstrip().endswith(".")
            assert len(shown["image"]["alt"]) > 20
    assert names or drawings or path not in TAUGHT
    assert len(names) == len(set(names))


def test_labels_are_unique():
    labels = []
    for path in CHAPTERS:
        text = path.read_text(encoding="utf-8")
        labels += re.findall(r"^\((\S+)\)=$", text, re.MULTILINE)
        labels += re.findall(r"^:label: (\S+)", text, re.MULTILINE)
        labels += re.findall(r"^ +name: (fig-\S+)", text, re.MULTILINE)
    assert sorted(labels) == sorted(set(labels))


def test_every_citation_has_an_entry():
    entries = (REPOSITORY / "book/references.bib").read_text(encoding="utf-8")
    known = re.findall(r"^@\w+\{([^,]+),", entries, re.MULTILINE)
    assert sorted(known) == sorted(set(known))
    for path in CHAPTERS:
        for keys in re.findall(r"\{cite[^}]*\}`([^`]*)`", path.read_text("utf-8")):
            for key in keys.split(","):
                assert key.strip() in known, f"{path.name} cites {key}"


def test_the_table_of_contents_is_complete():
    toc = yaml.safe_load((REPOSITORY / "_toc.yml").read_text(encoding="utf-8"))
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    assert all((REPOSITORY / f"{name}.md").exists() for name in [toc["root"], *files])
    chapters = [name for name in files if name.startswith("book/chapters/")]
    assert chapters == [f"book/chapters/{path.stem}" for path in CHAPTERS]


def test_every_exported_cell_links_to_its_line():
    """The Sphinx extension finds each cell in the generated module."""
    path = REPOSITORY / "book/_ext/annotated_cells.py"
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("annotated_cells", path)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    found = extension.find_lines(REPOSITORY / "annotated_moe")
    for chapter in map(read, CHAPTERS):
        for cell in chapter.cells:
            if "export" in cell.tags and not only_imports(cell.source):
                name, line = found.pop((chapter.path, cell.number))
                lines = (REPOSITORY / name).read_text("utf-8").split("\n")
                assert lines[line] == cell.source.split("\n")[0]
    assert not found


def test_the_address_stands_in_one_place():
    """Generated notebooks apart, only `_config.yml` names the repository."""
    address = tangle.repository(REPOSITORY).removeprefix("https://")
    places = subprocess.run(
        ["git", "grep", "-lF", "--untracked", address],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if places.returncode > 1:
        pytest.skip("not a git checkout")
    generated = re.compile(r"_config\.yml|book/chapters/.*\.ipynb")
    assert [p for p in places.stdout.split() if not generated.fullmatch(p)] == []


def test_the_lock_satisfies_the_package():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.!+]+", str(pin.specifier)) for pin in pins)
    locked = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for name, extra in project["optional-dependencies"].items():
        # libtpu alone is larger than all the rest; `plan` works without.
        # torch is larger still; requirements-parity.txt pins it.
        # tokamax is for other devices than those that run the tests.
        wanted += extra if name not in ("tpu", "parity", "kernels") else []
    for requirement in map(Requirement, wanted):
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_no_page_imports_what_a_later_page_exports():
    """So that each page runs on the chapters before it, as `make prefix` does."""
    book = tangle.gather(tangle.read_book(REPOSITORY))
    for chapter in book.chapters:
        for cell in chapter.cells:
            source = tangle.without_magics(cell.source)
            for link in tangle.read_imports(ast.parse(source)):
                package, _, module = link.module.partition(".")
                if package == "annotated_moe" and module in book.modules:
                    path, line = book.modules[module].exports.get(link.name, ("", 0))
                    here = f"{chapter.path}:{cell.line}"
                    assert path <= chapter.path, f"{here}: {link.name}, {path}:{line}"
