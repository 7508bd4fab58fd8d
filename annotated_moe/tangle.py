# Generated from book/chapters/90_tangle.md by `make sync`; edit the chapter.
"""A book that prints its own program holds every function twice, and
two copies drift apart: a fix lands in one while the other goes on being
read. This chapter builds the program that makes the second copy from
the first. It reads the chapters, refuses what would not work as a
package and says on which line, and writes the notebooks and the
package, byte for byte the same on every machine. Its own source is the
page you are reading.
"""

import argparse
import ast
import json
import re
import symtable
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path
from typing import Any


# %% book/chapters/90_tangle.md, cell 9
@dataclass(frozen=True)
class Problem:
    """What is wrong, and the file and line to look at."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


# %% book/chapters/90_tangle.md, cell 10
class TangleError(Exception):
    """Carries every `Problem` found. Nothing has been written."""

    def __init__(self, problems: list[Problem]):
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


# %% book/chapters/90_tangle.md, cell 12
FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,}) *(.*?) *$")


@dataclass(frozen=True)
class Fence:
    """A fenced block: where it opens, its info string, its body."""

    line: int
    info: str
    body: list[str]


# %% book/chapters/90_tangle.md, cell 13
def fences(path: str, lines: list[str]) -> Iterator[Fence]:
    """The outermost fenced blocks of a page, in order.

    Raises `TangleError` where a fence is never closed.
    Source: CommonMark 0.31, section 4.5.
    """
    start, marker, info = 0, "", ""
    for number, line in enumerate(lines, 1):
        match = FENCE.match(line)
        if match is None or not match[1].startswith(marker):
            continue
        if not marker:
            start, marker, info = number, match[1], match[2]
        elif not match[2]:
            yield Fence(start, info, lines[start : number - 1])
            marker = ""
        elif match[2].startswith("{"):
            break
    if marker:
        message = f"this fence is still open on line {number}"
        raise TangleError([Problem(path, start, message)])


# %% book/chapters/90_tangle.md, cell 16
@dataclass(frozen=True)
class Cell:
    """A code cell, counted from 1; `source` starts at `line`."""

    number: int
    line: int
    source: str
    tags: tuple[str, ...] = ()
    module: str = ""


# %% book/chapters/90_tangle.md, cell 17
def split_options(body: list[str]) -> tuple[str, int]:
    """The YAML at the head of a cell, and how many lines it takes."""
    if body[:1] == ["---"] and "---" in body[1:]:
        end = body.index("---", 1)
        return "\n".join(body[:end]), end + 1
    end = 0
    while end < len(body) and body[end].startswith(":"):
        end += 1
    return "\n".join(line[1:] for line in body[:end]), end


# %% book/chapters/90_tangle.md, cell 18
def parse_yaml(path: str, line: int, text: str) -> dict[str, Any]:
    """A YAML mapping that stands at `line` of `path`."""
    import yaml

    try:
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line += mark.line if mark else 0
        reason = getattr(error, "problem", None) or "unreadable"
        problem = Problem(path, line, f"not YAML: {reason}")
        raise TangleError([problem]) from None
    if not isinstance(data, dict):
        raise TangleError([Problem(path, line, "not a YAML mapping")])
    return data


# %% book/chapters/90_tangle.md, cell 19
TAGS = ["export", "check", "raises-exception"]
TAGS += ["hide-input", "hide-output", "hide-cell"]
TAGS += ["remove-input", "remove-output", "remove-cell"]
TAGS += ["remove-stderr"]
OPTIONS = ["tags", "module", "mystnb"]


# %% book/chapters/90_tangle.md, cell 20
def is_module(name: Any) -> bool:
    """Whether `name` can be a module: `moe`, `formats.pickles`."""
    parts = str(name).split(".")
    return all(part.isidentifier() for part in parts)


# %% book/chapters/90_tangle.md, cell 21
def mistake(options: dict[str, Any]) -> str:
    """What is wrong with a cell's options, or the empty string."""
    tags, module = options.get("tags", []), options.get("module", "")
    for option in options:
        if option not in OPTIONS:
            return f"unknown option `{option}`; known: {OPTIONS}"
    if not isinstance(tags, list):
        return "`tags` takes a list, as in [export]"
    for tag in tags:
        if tag not in TAGS:
            return f"unknown tag `{tag}`; known: {TAGS}"
    if module and "export" not in tags:
        return "`module` is for cells tagged `export`"
    if module and not is_module(module):
        return f"`{module}` cannot be the name of a module"
    return ""


# %% book/chapters/90_tangle.md, cell 22
def read_cell(path: str, number: int, fence: Fence) -> Cell:
    """Turn a `code-cell` fence into a `Cell`."""
    text, skip = split_options(fence.body)
    options = parse_yaml(path, fence.line + 1, text)
    if message := mistake(options):
        raise TangleError([Problem(path, fence.line, message)])
    if skip < len(fence.body) and not fence.body[skip].strip():
        skip += 1
    return Cell(
        number=number,
        line=fence.line + skip + 1,
        source="\n".join(fence.body[skip:]).rstrip(),
        tags=tuple(options.get("tags", [])),
        module=options.get("module", ""),
    )


# %% book/chapters/90_tangle.md, cell 23
def read_cells(path: str, lines: list[str]) -> Iterator[Cell]:
    """The code cells of a page, in order."""
    number = 0
    for fence in fences(path, lines):
        if fence.info.split()[:1] == ["{code-cell}"]:
            number += 1
            yield read_cell(path, number, fence)


# %% book/chapters/90_tangle.md, cell 24
def opening(path: str, lines: list[str], start: int) -> str:
    """The first paragraph after the title, its lines joined."""
    title = start
    blank = re.compile(r"\s*|\(.+\)=\s*")
    while title < len(lines) and blank.fullmatch(lines[title]):
        title += 1
    words: list[str] = []
    for line in lines[title + 1 :]:
        if line.strip():
            words.append(line.strip())
        elif words:
            break
    titled = title < len(lines) and lines[title].startswith("# ")
    if not (titled and words) or re.match("```|~~~|:::|#", words[0]):
        message = "a chapter starts with a title and a paragraph"
        raise TangleError([Problem(path, title + 1, message)])
    return " ".join(words)


# %% book/chapters/90_tangle.md, cell 25
@dataclass(frozen=True)
class Chapter:
    """One page: its own module, what it says of others, its cells."""

    path: str
    text: str
    module: str
    modules: dict[str, str]
    needs: tuple[str, ...]
    opening: str
    cells: tuple[Cell, ...]


# %% book/chapters/90_tangle.md, cell 26
def page_header(path: str, lines: list[str]) -> dict[str, Any]:
    """What a page's header says under `annotated_moe`."""
    header = parse_yaml(path, 2, "\n".join(lines)).get("annotated_moe")
    header = header if isinstance(header, dict) else {}
    modules, message = header.get("modules") or {}, ""
    if not is_module(header.get("module", "")):
        message = "the header names no `annotated_moe: module:`"
    elif not isinstance(modules, dict):
        message = "`modules` maps the names of modules to sentences"
    for name in [] if message else modules:
        if not (is_module(name) and isinstance(modules[name], str)):
            message = f"`modules` has no sentence for a module `{name}`"
    if message:
        raise TangleError([Problem(path, 1, message)])
    return {**header, "modules": modules}


# %% book/chapters/90_tangle.md, cell 27
def read_chapter(path: str, text: str) -> Chapter:
    """Read a page of MyST; raises `TangleError` where it cannot."""
    lines = text.splitlines()
    fenced = lines[:1] == ["---"] and "---" in lines[1:]
    end = lines.index("---", 1) if fenced else 0
    header = page_header(path, lines[1:end])
    return Chapter(
        path=path,
        text=text,
        module=header["module"],
        modules=header["modules"],
        needs=tuple(map(str, header.get("needs") or [])),
        opening=opening(path, lines, end + 1),
        cells=tuple(read_cells(path, lines)),
    )


# %% book/chapters/90_tangle.md, cell 30
@cache
def parse(path: str, cell: Cell) -> ast.Module:
    """The syntax tree of an exported cell, lines as in the chapter."""
    try:
        compile(cell.source, path, "exec", dont_inherit=True)
        tree = ast.parse(cell.source, path, feature_version=(3, 11))
    except SyntaxError as error:
        line = min(error.lineno or 1, cell.source.count("\n") + 1)
        message = f"syntax error: {error.msg}"
        if re.match(r"\s*[%!]", cell.source.splitlines()[line - 1]):
            message = "IPython magics cannot be exported"
        problem = Problem(path, cell.line + line - 1, message)
        raise TangleError([problem]) from None
    return ast.increment_lineno(tree, cell.line - 1)


# %% book/chapters/90_tangle.md, cell 31
def exported(chapter: Chapter) -> list[tuple[Cell, ast.Module]]:
    """The exported cells of a page with their syntax trees."""
    cells = [cell for cell in chapter.cells if "export" in cell.tags]
    return [(cell, parse(chapter.path, cell)) for cell in cells]


# %% book/chapters/90_tangle.md, cell 33
def empty_axes(tree: ast.Module, types: set[str]) -> None:
    """Empty the axis strings of the array types named in `types`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Subscript):
            continue
        name = ast.unparse(node.value).split(".")[0]
        if name in types and isinstance(node.slice, ast.Tuple):
            for part in node.slice.elts[1:]:
                if isinstance(part, ast.Constant):
                    part.value = 0


# %% book/chapters/90_tangle.md, cell 34
def ask_pyflakes(tree: ast.Module, types: set[str]) -> list[Any]:
    """The messages of pyflakes about `tree`, from its first line on."""
    from pyflakes.checker import Checker

    empty_axes(tree, types)
    messages = Checker(tree, filename="cells.py").messages
    return sorted(messages, key=lambda message: message.lineno)


# %% book/chapters/90_tangle.md, cell 37
def names_bound(statement: ast.stmt) -> dict[str, bool]:
    """The names a statement binds, and whether by an import."""
    if isinstance(statement, (ast.AugAssign, ast.Delete)):
        return {}
    source = ast.unparse(statement)
    symbols = symtable.symtable(source, "", "exec").get_symbols()
    return {
        symbol.get_name(): symbol.is_imported()
        for symbol in symbols
        if symbol.is_assigned() or symbol.is_imported()
    }


# %% book/chapters/90_tangle.md, cell 38
MAGIC = re.compile(r"^([ \t]*)[%!].*$", re.MULTILINE)


def without_magics(source: str) -> str:
    """A notebook cell as plain Python; nothing, if it is not that."""
    for code in [source, MAGIC.sub(r"\1pass", source)]:
        try:
            ast.parse(code)
            return code
        except SyntaxError:
            pass
    return ""


# %% book/chapters/90_tangle.md, cell 39
def private(chapter: Chapter) -> dict[str, int]:
    """The names that only cells without `export` bind, and where."""
    found: dict[str, int] = {}
    for cell in chapter.cells:
        if "export" in cell.tags:
            continue
        for statement in ast.parse(without_magics(cell.source)).body:
            for name in names_bound(statement):
                line = cell.line + statement.lineno - 1
                found.setdefault(name, line)
    return found


# %% book/chapters/90_tangle.md, cell 40
@dataclass(frozen=True)
class Import:
    """`from module import name as alias`; the last two may be empty."""

    module: str
    name: str = ""
    alias: str = ""
    line: int = field(default=0, compare=False)

    @property
    def binds(self) -> str:
        """The name that stands for it in the code below."""
        return self.alias or self.name or self.module.split(".")[0]


# %% book/chapters/90_tangle.md, cell 41
def read_imports(tree: ast.AST) -> list[Import]:
    """Every name that some import in `tree` binds."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for each in node.names:
                module, name = each.name, ""
                if isinstance(node, ast.ImportFrom):
                    module, name = node.module or "", each.name
                alias, line = each.asname or "", node.lineno
                found.append(Import(module, name, alias, line))
    return found


# %% book/chapters/90_tangle.md, cell 42
def only_imports(tree: ast.Module) -> bool:
    """Whether a cell has imports in it and nothing else."""
    kinds = ast.Import, ast.ImportFrom
    return all(isinstance(node, kinds) for node in tree.body)


# %% book/chapters/90_tangle.md, cell 43
def misplaced(path: str, tree: ast.Module) -> list[Problem]:
    """Imports of a form that no exported cell may have."""
    problems = []
    for node in ast.walk(tree):
        message = ""
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        if getattr(node, "level", 0):
            message = "a notebook has no package for a relative import"
        elif node.names[0].name == "*":
            message = "`import *` hides where names come from"
        elif node in tree.body and not only_imports(tree):
            message = "imports stand in a cell of their own"
        if message:
            problems.append(Problem(path, node.lineno, message))
    return problems


# %% book/chapters/90_tangle.md, cell 44
def chapter_imports(chapter: Chapter) -> dict[str, list[Import]]:
    """What the import cells of a page bind, by name."""
    found: dict[str, list[Import]] = {}
    for _, tree in exported(chapter):
        for link in read_imports(tree) if only_imports(tree) else []:
            known = found.setdefault(link.binds, [])
            known += [link] if link not in known else []
    return found


# %% book/chapters/90_tangle.md, cell 45
def array_types(imports: dict[str, list[Import]]) -> set[str]:
    """The names that stand for `jaxtyping` or something in it."""
    links = chain.from_iterable(imports.values())
    return {i.binds for i in links if i.module == "jaxtyping"}


# %% book/chapters/90_tangle.md, cell 46
PageLine = tuple[str, int]
Edges = dict[tuple[str, str], PageLine]


# %% book/chapters/90_tangle.md, cell 47
@dataclass
class Module:
    """A module to be. It starts in the chapter of `start`."""

    name: str
    start: PageLine
    cells: list[tuple[Chapter, Cell]] = field(default_factory=list)
    exports: dict[str, PageLine] = field(default_factory=dict)
    imports: dict[Import, PageLine] = field(default_factory=dict)


# %% book/chapters/90_tangle.md, cell 48
@dataclass
class Book:
    """All modules, and what was found on the way to them.

    `names` has, for each chapter, the module of what it defines;
    `edges`, for two modules, where one imports the other on loading;
    `forward`, the uses of what only a later chapter exports.
    """

    chapters: list[Chapter]
    modules: dict[str, Module] = field(default_factory=dict)
    names: dict[str, dict[str, str]] = field(default_factory=dict)
    edges: Edges = field(default_factory=dict)
    forward: list[Problem] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


# %% book/chapters/90_tangle.md, cell 49
def stop_if_wrong(book: Book) -> None:
    """Raises `TangleError` with every problem found so far."""
    if book.problems:
        raise TangleError(sorted(set(book.problems), key=reading_order))


# %% book/chapters/90_tangle.md, cell 50
def reading_order(problem: Problem) -> tuple[str, int, str]:
    """The order in which one wants to read problems."""
    return problem.path, problem.line, problem.message


# %% book/chapters/90_tangle.md, cell 51
def define(
    book: Book,
    module: Module,
    name: str,
    place: PageLine,
    imported: bool,
) -> None:
    """Enter a name of a module; a problem if it has that already."""
    path, line = place
    first = module.exports.setdefault(name, place)
    names = book.names.setdefault(path, {})
    if not imported:
        other = names.setdefault(name, module.name)
        if other != module.name:
            first = book.modules[other].exports[name]
    if first != place and name != "_":
        where = "" if first[0] == path else f" of {first[0]}"
        message = f"`{name}` is exported already, on line {first[1]}"
        book.problems.append(Problem(path, line, message + where))


# %% book/chapters/90_tangle.md, cell 52
def is_passed_on(link: Import) -> bool:
    """Whether an import is a re-export: `import y as y`."""
    return link.alias == link.name != ""


# %% book/chapters/90_tangle.md, cell 53
def add_cell(
    book: Book, chapter: Chapter, cell: Cell, tree: ast.Module
) -> None:
    """Sort one exported cell into its module."""
    name, path = cell.module or chapter.module, chapter.path
    passed_on = list(filter(is_passed_on, read_imports(tree)))
    if only_imports(tree) and not passed_on:
        return
    module = Module(name, (path, cell.line))
    module = book.modules.setdefault(name, module)
    if only_imports(tree):
        for link in passed_on:
            module.imports[link] = path, link.line
            define(book, module, link.name, (path, link.line), True)
        return
    module.cells.append((chapter, cell))
    for statement in tree.body:
        for name, imported in names_bound(statement).items():
            place = path, statement.lineno
            define(book, module, name, place, imported)


# %% book/chapters/90_tangle.md, cell 54
def add_packages(book: Book) -> None:
    """An `__init__` for every folder in which there is a module."""
    for name, module in sorted(book.modules.items()):
        parts = name.split(".")
        for depth in range(len(parts)):
            folder = ".".join(parts[:depth])
            front = f"{folder}.__init__".removeprefix(".")
            if folder in book.modules:
                message = f"`{folder}` cannot be module and folder"
                book.problems.append(Problem(*module.start, message))
            book.modules.setdefault(front, Module(front, module.start))


# %% book/chapters/90_tangle.md, cell 55
def gather(chapters: list[Chapter]) -> Book:
    """Sort the exported cells of all chapters into modules."""
    book = Book(chapters)
    for chapter in chapters:
        for cell in chapter.cells:
            if "export" not in cell.tags:
                continue
            try:
                tree = parse(chapter.path, cell)
            except TangleError as error:
                book.problems += error.problems
                continue
            book.problems += misplaced(chapter.path, tree)
            add_cell(book, chapter, cell, tree)
    add_packages(book)
    stop_if_wrong(book)
    return book


# %% book/chapters/90_tangle.md, cell 56
UNDEFINED = ["UndefinedName", "UndefinedExport"]


def explain(chapter: Chapter, book: Book, message: Any) -> str:
    """What pyflakes says, with what we know about the name."""
    if type(message).__name__ not in UNDEFINED:
        return message.message % message.message_args
    name = message.message_args[0]
    home = book.names.get(chapter.path, {}).get(name)
    if home:
        _, first = book.modules[home].exports[name]
        return f"`{name}` is used before line {first} defines it"
    said = f"no exported cell defines `{name}`"
    if line := private(chapter).get(name):
        return f"{said}; line {line} does, not exported"
    for module in book.modules.values():
        path, _ = module.exports.get(name, ("", 0))
        if path and path < chapter.path:
            return f"{said}; import it from `{dotted(module.name)}`"
    return said


# %% book/chapters/90_tangle.md, cell 57
def is_meant(line: str, links: list[Import], message: Any) -> bool:
    """Whether a complaint is about something done on purpose."""
    kind, passed_on = type(message).__name__, ""
    if kind == "UnusedImport":
        passed_on = message.message_args[0]
    kept = [f"{i.module}.{i.name}" for i in links if is_passed_on(i)]
    again = kind == "RedefinedWhileUnused"
    return "# noqa" in line or again or passed_on in kept


# %% book/chapters/90_tangle.md, cell 58
def judge_chapter(book: Book, chapter: Chapter) -> None:
    """Problems of a chapter as a notebook, from top to bottom."""
    imports = chapter_imports(chapter)
    body = [node for _, tree in exported(chapter) for node in tree.body]
    tree, lines = ast.Module(body, []), chapter.text.splitlines()
    links = read_imports(tree)
    for message in ask_pyflakes(tree, array_types(imports)):
        if not is_meant(lines[message.lineno - 1], links, message):
            text = explain(chapter, book, message)
            problem = Problem(chapter.path, message.lineno, text)
            book.problems.append(problem)
    own = book.names.get(chapter.path, {})
    for name in sorted(imports):
        links = [i for i in imports[name] if not is_passed_on(i)]
        if name in own and links:
            message = f"this chapter defines `{name}` itself"
            problem = Problem(chapter.path, links[0].line, message)
            book.problems.append(problem)


# %% book/chapters/90_tangle.md, cell 59
def names_missing(
    body: list[ast.stmt], types: set[str]
) -> list[tuple[str, int]]:
    """The names, with lines, that some code takes from outside."""
    return [
        (message.message_args[0], message.lineno)
        for message in ask_pyflakes(ast.Module(body, []), types)
        if type(message).__name__ in UNDEFINED
    ]


# %% book/chapters/90_tangle.md, cell 62
PACKAGE = "annotated_moe"


# %% book/chapters/90_tangle.md, cell 63
def dotted(name: str) -> str:
    """A module of ours as Python writes it: `annotated_moe.moe`."""
    return f"{PACKAGE}.{name}".removesuffix(".__init__")


# %% book/chapters/90_tangle.md, cell 64
def module_of(book: Book, name: str) -> str:
    """The module of ours that `annotated_moe.moe` names, if any."""
    if name.split(".")[0] != PACKAGE:
        return ""
    inner = name.removeprefix(PACKAGE).removeprefix(".")
    for module in [inner, f"{inner}.__init__".removeprefix(".")]:
        if module in book.modules:
            return module
    return ""


# %% book/chapters/90_tangle.md, cell 65
def target(book: Book, link: Import) -> tuple[str, str]:
    """The module of ours, and the name in it, that an import means."""
    whole = module_of(book, f"{link.module}.{link.name or '?'}")
    if whole:
        return whole, ""
    return module_of(book, link.module), link.name


# %% book/chapters/90_tangle.md, cell 66
def look_ahead(
    book: Book, other: str, name: str, place: PageLine
) -> None:
    """Note a use of a name, or a module, that only comes later."""
    module = book.modules[other]
    path, _ = module.exports.get(name, module.start)
    if path > place[0]:
        what = f"`{name}`" if name else f"`{dotted(other)}`"
        message = f"{what} is exported only later, by {path}"
        book.forward.append(Problem(*place, message))


# %% book/chapters/90_tangle.md, cell 67
def follow(
    book: Book, module: Module, link: Import, place: PageLine, now: bool
) -> bool:
    """Whether `module` needs this import; notes what is wrong."""
    if link.module.split(".")[0] != PACKAGE:
        return True
    other, name = target(book, link)
    wrong = ""
    if not other:
        wrong = f"no chapter exports `{link.module}`"
    elif name and name not in book.modules[other].exports:
        wrong = f"`{dotted(other)}` exports no `{name}`"
    if wrong:
        book.problems.append(Problem(*place, wrong))
        return False
    line = place[1] if name else link.line
    look_ahead(book, other, name, (place[0], line))
    if now and not (name and other == module.name):
        book.edges.setdefault((module.name, other), place)
    return not name or other != module.name


# %% book/chapters/90_tangle.md, cell 68
def look_through(
    book: Book, path: str, tree: ast.AST, links: list[Import]
) -> None:
    """Follow `module.name`, for modules of ours that are imported."""
    known = {link.binds: link for link in links}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        root, _, rest = ast.unparse(node.value).partition(".")
        link = known.get(root)
        if link is None or link.module.split(".")[0] != PACKAGE:
            continue
        parts = [link.module, link.name, rest]
        if not (link.name or link.alias):
            parts = [root, rest]
        other = module_of(book, ".".join(filter(None, parts)))
        if other and node.attr in book.modules[other].exports:
            look_ahead(book, other, node.attr, (path, node.lineno))


# %% book/chapters/90_tangle.md, cell 69
def in_functions(tree: ast.AST) -> set[Import]:
    """The imports that wait until some function is called."""
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    return {
        link
        for node in ast.walk(tree)
        if isinstance(node, kinds)
        for link in read_imports(node)
    }


# %% book/chapters/90_tangle.md, cell 70
def connect_cell(
    book: Book, module: Module, path: str, tree: ast.Module
) -> list[Import]:
    """Follow the imports inside a cell, and return them."""
    own, late = read_imports(tree), in_functions(tree)
    for link in own:
        place = path, link.line
        follow(book, module, link, place, now=link not in late)
    return own


# %% book/chapters/90_tangle.md, cell 71
def home_of(book: Book, path: str, name: str) -> str:
    """The module to which a chapter exports a name."""
    homes = [
        module.name
        for module in book.modules.values()
        if module.exports.get(name, ("", 0))[0] == path
    ]
    return book.names.get(path, {}).get(name) or "".join(homes[:1])


# %% book/chapters/90_tangle.md, cell 72
def add_import(module: Module, link: Import, place: PageLine) -> None:
    """Put an import into a head, unless it is passed on from there."""
    if link.alias == link.name:
        link = replace(link, alias="")
    passed_on = replace(link, alias=link.alias or link.name)
    if passed_on not in module.imports or link.alias:
        module.imports.setdefault(link, place)


# %% book/chapters/90_tangle.md, cell 73
def connect(book: Book, module: Module, chapter: Chapter) -> None:
    """Give a module the imports that cells of one chapter need."""
    imports = chapter_imports(chapter)
    path = chapter.path
    cells = [cell for page, cell in module.cells if page is chapter]
    trees = [parse(path, cell) for cell in cells]
    reached = {
        ast.unparse(node)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    }
    body = [node for tree in trees for node in tree.body]
    for name, line in names_missing(body, array_types(imports)):
        home = home_of(book, path, name)
        links = imports.get(name) or [Import(dotted(home), name)]
        # `import a.b` and `import a.c` both bind `a`: which is meant?
        exact = [link for link in links if link.module in reached]
        for link in exact or links:
            place = path, line
            if follow(book, module, link, place, now=True):
                add_import(module, link, place)
    shared = list(chain.from_iterable(imports.values()))
    for link in shared:
        # This one is used by being there.
        if link.module == "__future__":
            module.imports.setdefault(link, module.start)
    for tree in trees:
        inner = connect_cell(book, module, path, tree)
        look_through(book, path, tree, shared + inner)


# %% book/chapters/90_tangle.md, cell 74
def judge_head(book: Book, module: Module) -> None:
    """Problems between a module's imports, and with what it defines."""
    meanings: dict[str, tuple[str, str]] = {}
    for link, place in module.imports.items():
        name, meaning = link.binds, (link.module, link.name)
        if not (link.name or link.alias):
            meaning = name, ""
        message = ""
        if meanings.setdefault(name, meaning) != meaning:
            first = ".".join(filter(None, meanings[name]))
            message = f"`{name}` is `{first}` for other cells"
        elif name in module.exports and not is_passed_on(link):
            path, line = module.exports[name]
            message = f"`{name}` is what line {line} of {path} defines"
        if message:
            message += f" of `{dotted(module.name)}`"
            book.problems.append(Problem(*place, message))


# %% book/chapters/90_tangle.md, cell 75
def circle(edges: Edges) -> list[Problem]:
    """A cycle among module-level imports, at one of its imports."""
    graph: dict[str, list[str]] = {}
    for importer, imported in edges:
        graph.setdefault(importer, []).append(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        names = list(reversed(error.args[1]))
        path, line = edges[names[0], names[1]]
        message = f"import cycle: {' imports '.join(names)}"
        return [Problem(path, line, message)]
    return []


# %% book/chapters/90_tangle.md, cell 76
def connect_all(book: Book) -> None:
    """Judge every chapter, then give every module its imports."""
    for chapter in book.chapters:
        judge_chapter(book, chapter)
    stop_if_wrong(book)
    for module in book.modules.values():
        pages = {page.path: page for page, _ in module.cells}
        for link, place in module.imports.items():
            follow(book, module, link, place, now=True)
        for chapter in pages.values():
            connect(book, module, chapter)
        judge_head(book, module)
    stop_if_wrong(book)
    book.problems += circle(book.edges)
    stop_if_wrong(book)


# %% book/chapters/90_tangle.md, cell 83
def plain(text: str) -> str:
    """Prose without MyST roles, citations and links."""
    text = re.sub(r"\s*\{cite[^}]*\}`[^`]*`", "", text)
    text = re.sub(r"\{[^}]*\}`([^`<]*?)\s*(<[^>]*>)?`", r"\1", text)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


# %% book/chapters/90_tangle.md, cell 84
def module_prose(book: Book, name: str) -> str:
    """What the book says a module is, in prose."""
    for chapter in book.chapters:
        if name in chapter.modules:
            return chapter.modules[name]
    for chapter in book.chapters:
        if name == chapter.module:
            return chapter.opening
    if name.split(".")[-1] == "__init__":
        return f"The modules of `{dotted(name)}`."
    place = book.modules[name].start
    message = f"no header says under `modules` what `{name}` is"
    raise TangleError([Problem(*place, message)])


# %% book/chapters/90_tangle.md, cell 85
def docstring(prose: str) -> str:
    """A paragraph as the docstring of a module."""
    text = plain(" ".join(prose.split())).replace('"""', "'''")
    filled = textwrap.fill(
        text,
        width=72,
        initial_indent='r"""' if "\\" in text else '"""',
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f'{filled}\n"""'


# %% book/chapters/90_tangle.md, cell 86
def natural(text: str) -> str:
    """A key that sorts `llama4` before `llama10`."""
    return re.sub(r"\d+", lambda found: found[0].zfill(9), text.lower())


# %% book/chapters/90_tangle.md, cell 87
def import_key(name: str) -> tuple[int, str, str]:
    """Constants, then classes, then the rest."""
    kind = 2 - name[:1].isupper() - (len(name) > 1 and name.isupper())
    return kind, natural(name), name


# %% book/chapters/90_tangle.md, cell 88
def import_section(module: str) -> int:
    """Future, standard library, third party, our own."""
    root = module.split(".")[0]
    if root == "__future__":
        return 0
    if root in sys.stdlib_module_names:
        return 1
    return 3 if root == PACKAGE else 2


# %% book/chapters/90_tangle.md, cell 89
def from_import(module: str, names: list[str]) -> str:
    """One `from` import, wrapped where it passes 72 columns."""
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= 72:
        return line
    inner = "".join(f"    {name},\n" for name in names)
    return f"from {module} import (\n{inner})"


# %% book/chapters/90_tangle.md, cell 90
def link_key(link: Import) -> tuple[Any, ...]:
    """`import` before `from`, then by module, then by name."""
    module = natural(link.module), link.module
    return bool(link.name), module, import_key(link.name), link.alias


# %% book/chapters/90_tangle.md, cell 91
def import_lines(links: Iterable[Import]) -> Iterator[str]:
    """The import statements of one section, in order."""
    groups: dict[tuple[str, str], list[str]] = {}
    for link in sorted(set(links), key=link_key):
        name = link.name or link.module
        written = f"{name} as {link.alias}" if link.alias else name
        # What has an alias, or no `from`, is a statement by itself.
        alone = "" if link.name and not link.alias else written
        groups.setdefault((link.module, alone), []).append(written)
        if not link.name:
            groups[link.module, alone] = []
    for (module, alone), names in groups.items():
        plain = f"import {alone}"
        yield from_import(module, names) if names else plain


# %% book/chapters/90_tangle.md, cell 92
def import_block(module: Module) -> str:
    """The imports of a module, as its head has them."""
    parts: dict[int, list[Import]] = {0: [], 1: [], 2: [], 3: []}
    for link in module.imports:
        parts[import_section(link.module)].append(link)
    blocks = ["\n".join(import_lines(parts[key])) for key in parts]
    return "\n\n".join(filter(None, blocks))


# %% book/chapters/90_tangle.md, cell 93
def chapters_of(module: Module) -> list[str]:
    """The chapters that a module comes from, in reading order."""
    paths = {path for path, _ in module.exports.values()}
    paths |= {page.path for page, _ in module.cells}
    return sorted(paths | {module.start[0]})


# %% book/chapters/90_tangle.md, cell 94
def gap_above(module: Module, page: Chapter, cell: Cell) -> str:
    """The blank lines before a cell: one under the head, else two."""
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    first = (page, cell) == module.cells[0]
    tall = isinstance(parse(page.path, cell).body[0], kinds)
    # Between imports and a definition ruff wants two as well.
    one = first and not (module.imports and tall)
    return "\n\n" if one else "\n\n\n"


# %% book/chapters/90_tangle.md, cell 95
def module_text(book: Book, module: Module) -> str:
    """The Python file of a module."""
    paths = chapters_of(module)
    chapters = "chapters" if len(paths) > 1 else "chapter"
    text = f"# Generated from {', '.join(paths)} by `make sync`; "
    text += f"edit the {chapters}.\n"
    text += docstring(module_prose(book, module.name))
    if block := import_block(module):
        text += f"\n\n{block}"
    for page, cell in module.cells:
        text += gap_above(module, page, cell)
        text += f"# %% {page.path}, cell {cell.number}\n{cell.source}"
    return text + "\n"


# %% book/chapters/90_tangle.md, cell 99
def origin(module: Module, text: str, line: int) -> PageLine:
    """The line of a page that a line of a generated module is."""
    lines = text.splitlines()
    for above in range(line - 1, -1, -1):
        for page, cell in module.cells:
            mark = f"# %% {page.path}, cell {cell.number}"
            if lines[above] == mark:
                return page.path, cell.line + line - above - 2
    return module.start


# %% book/chapters/90_tangle.md, cell 100
def judge_text(
    module: Module, text: str, types: set[str]
) -> list[Problem]:
    """What pyflakes finds in a generated module."""
    lines, problems = text.splitlines(), []
    for message in ask_pyflakes(ast.parse(text), types):
        place = origin(module, text, message.lineno)
        in_head = place == module.start
        unused = type(message).__name__ == "UnusedImport"
        meant = "# noqa" in lines[message.lineno - 1]
        if not (meant or (in_head and unused)):
            said = message.message % message.message_args
            said += f", in `{dotted(module.name)}`"
            problems.append(Problem(*place, said))
    return problems


# %% book/chapters/90_tangle.md, cell 101
def notebook_cell(
    kind: str, name: str, source: str, **metadata: Any
) -> dict[str, Any]:
    """A cell of a notebook, without output."""
    cell: dict[str, Any] = {"cell_type": kind, "id": name}
    cell |= {"metadata": metadata}
    cell |= {"source": source.splitlines(keepends=True)}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    return cell


# %% book/chapters/90_tangle.md, cell 102
INSTALL = """\
# Fetch what is missing. Where everything is installed, do nothing.
import importlib.util

needed = {needed}
if not all(importlib.util.find_spec(name) for name in needed):
    %pip install -q {requirements}"""


# %% book/chapters/90_tangle.md, cell 103
def install_cell(chapter: Chapter, address: str) -> str:
    """The first cell of a notebook: installs the package if missing."""
    wanted = [f"annotated-moe @ git+{address}", *chapter.needs]
    return INSTALL.format(
        needed=json.dumps([PACKAGE, *chapter.needs]),
        requirements=" ".join(f'"{name}"' for name in wanted),
    )


# %% book/chapters/90_tangle.md, cell 104
def notebook_cells(chapter: Chapter) -> Iterator[dict[str, Any]]:
    """The cells of a page as Jupytext reads them, with fixed ids."""
    import jupytext

    read = jupytext.reads(chapter.text, fmt="md:myst").cells
    theirs = [cell.source for cell in read if cell.cell_type == "code"]
    if theirs != [cell.source for cell in chapter.cells]:
        message = "Jupytext finds other code cells on this page"
        raise TangleError([Problem(chapter.path, 1, message)])
    counts = {"code": 0, "markdown": 0}
    for cell in read:
        kind = cell.cell_type
        counts[kind] += 1
        name = f"{kind}-{counts[kind]}"
        yield notebook_cell(kind, name, cell.source, **cell.metadata)


# %% book/chapters/90_tangle.md, cell 105
METADATA = {
    "jupytext": {"formats": "md:myst,ipynb"},
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}


# %% book/chapters/90_tangle.md, cell 106
def notebook_text(chapter: Chapter, address: str) -> str:
    """The notebook of a page: no outputs, no versions, no dates."""
    install = install_cell(chapter, address)
    first = notebook_cell("code", "install", install)
    notebook = {
        "cells": [first, *notebook_cells(chapter)],
        "metadata": METADATA,
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    text = json.dumps(
        notebook, indent=1, ensure_ascii=False, sort_keys=True
    )
    return text + "\n"


# %% book/chapters/90_tangle.md, cell 109
@dataclass(frozen=True)
class Output:
    """A generated file, and the chapters it comes from."""

    path: str
    text: str
    chapter: str


# %% book/chapters/90_tangle.md, cell 110
@dataclass
class Tangled:
    """All generated files, and what a builder should hear of."""

    outputs: list[Output]
    large: list[str] = field(default_factory=list)


# %% book/chapters/90_tangle.md, cell 111
def read_file(path: str, file: Path) -> Chapter:
    """Read a page; its other cells must be Python, but for magics."""
    try:
        chapter = read_chapter(path, file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise TangleError([Problem(path, 1, "not UTF-8")]) from None
    for cell in chapter.cells:
        code = without_magics(cell.source)
        free = {"export", "raises-exception"} & set(cell.tags)
        if code or free or cell.source[:2] in ["", "%%"]:
            continue
        parse(path, cell)
    return chapter


# %% book/chapters/90_tangle.md, cell 112
def read_book(root: Path, last: int | None = None) -> list[Chapter]:
    """Every chapter up to number `last`, or the problems of all."""
    chapters: list[Chapter] = []
    problems: list[Problem] = []
    for file in sorted(root.glob("book/chapters/*.md")):
        path = file.relative_to(root).as_posix()
        number = re.match(r"\d*", file.name)
        if last is not None and number and int(number[0] or 0) > last:
            continue
        try:
            chapters.append(read_file(path, file))
        except TangleError as error:
            problems += error.problems
    if not chapters and not problems:
        problems.append(Problem("book/chapters", 1, "no chapters here"))
    if problems:
        raise TangleError(problems)
    return chapters


# %% book/chapters/90_tangle.md, cell 113
def repository(root: Path) -> str:
    """The address of the repository, from its one place."""
    path = root / "_config.yml"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    config = parse_yaml(path.name, 1, text)
    address = (config.get("repository") or {}).get("url")
    if not address:
        message = "no `repository: url:` for notebooks to install from"
        raise TangleError([Problem(path.name, 1, message)])
    return str(address)


# %% book/chapters/90_tangle.md, cell 114
def module_outputs(book: Book) -> list[Output]:
    """Every module as a file; raises what pyflakes has to say."""
    outputs = []
    for name, module in sorted(book.modules.items()):
        text, types = module_text(book, module), set()
        for page, _ in module.cells:
            types |= array_types(chapter_imports(page))
        book.problems += judge_text(module, text, types)
        path = f"{PACKAGE}/{name.replace('.', '/')}.py"
        source = ", ".join(chapters_of(module))
        outputs.append(Output(path, text, source))
    stop_if_wrong(book)
    return outputs


# %% book/chapters/90_tangle.md, cell 115
def judge_titles(book: Book) -> None:
    """Problems with what headers say of modules."""
    for chapter in book.chapters:
        for name in chapter.modules:
            if name not in book.modules:
                message = f"no cell is exported to `{name}`"
                problem = Problem(chapter.path, 1, message)
                book.problems.append(problem)


# %% book/chapters/90_tangle.md, cell 116
def largest(outputs: list[Output]) -> list[str]:
    """The modules that hold more than a tenth of all lines."""
    counts = {o.path: o.text.count("\n") for o in outputs}
    total = sum(counts.values())
    return [
        f"{path} has {count / total:.0%} of all lines"
        for path, count in counts.items()
        if count * 10 > total
    ]


# %% book/chapters/90_tangle.md, cell 117
def tangle(root: Path, last: int | None = None) -> Tangled:
    """Every generated file of the book under `root`; writes nothing.

    Raises `TangleError` with every problem of every chapter.
    """
    chapters, address = read_book(root, last), repository(root)
    book = gather(chapters)
    judge_titles(book)
    connect_all(book)
    book.problems += sorted(set(book.forward), key=reading_order)
    outputs = module_outputs(book)
    rooms = largest(outputs)
    for chapter in chapters:
        path = chapter.path.removesuffix(".md") + ".ipynb"
        text = notebook_text(chapter, address)
        outputs.append(Output(path, text, chapter.path))
    return Tangled(outputs, rooms)


# %% book/chapters/90_tangle.md, cell 118
def stale(root: Path, outputs: list[Output]) -> list[str]:
    """Generated files whose chapter no longer produces them.

    Raises `TangleError` for a file that was written by hand.
    """
    files = [*root.glob(f"{PACKAGE}/**/*.py")]
    files += root.glob("book/chapters/*.ipynb")
    paths = {path.relative_to(root).as_posix() for path in files}
    extra = sorted(paths - {output.path for output in outputs})
    for path in extra:
        text = (root / path).read_text(encoding="utf-8")
        if "# Generated from" not in text and '"install"' not in text:
            message = "no chapter exports this file; move it into one"
            raise TangleError([Problem(path, 1, message)])
    return extra


# %% book/chapters/90_tangle.md, cell 119
def current(root: Path, output: Output) -> str | None:
    """What stands in the place of `output` now, to the byte."""
    path = root / output.path
    return path.read_bytes().decode("utf-8") if path.exists() else None


# %% book/chapters/90_tangle.md, cell 120
def sync(root: Path, outputs: list[Output]) -> list[str]:
    """Bring the generated files up to date; say what was done."""
    extra = stale(root, outputs)
    changed = [o for o in outputs if current(root, o) != o.text]
    for output in changed:
        path = root / f"{output.path}.new"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(output.text.encode("utf-8"))
    for output in changed:
        (root / f"{output.path}.new").replace(root / output.path)
    for name in extra:
        (root / name).unlink()
    done = [f"wrote {output.path}" for output in changed]
    return done + [f"removed {name}" for name in extra]


# %% book/chapters/90_tangle.md, cell 121
def check(root: Path, outputs: list[Output]) -> list[str]:
    """What `sync` would change, and the chapter it would follow."""
    extra = stale(root, outputs)
    found = [f"{name}: no chapter makes this file" for name in extra]
    for output in outputs:
        text = current(root, output)
        message = f"{output.path} is missing"
        if text is not None:
            new, old = output.text.split("\n"), text.split("\n")
            same = [a == b for a, b in zip(new, old, strict=False)]
            line = [*same, False].index(False) + 1
            message = f"{output.path} differs from line {line} on"
        if text != output.text:
            found.append(f"{output.chapter}: {message}")
    return found


# %% book/chapters/90_tangle.md, cell 126
def run_options(options: argparse.Namespace) -> list[str]:
    """Tangle as the command line says; what changed, or would."""
    root, into = options.root, options.into or options.root
    tangled = tangle(root, options.upto)
    if options.check:
        lines = check(root, tangled.outputs)
    elif options.into:
        done = sync(into, tangled.outputs)
        lines = [f"in {into}: {line}" for line in done]
    else:
        lines = sync(root, tangled.outputs)
    if tangled.large and options.upto is None:
        print("; ".join(tangled.large), file=sys.stderr)
    return lines


# %% book/chapters/90_tangle.md, cell 127
def main(arguments: list[str] | None = None) -> int:
    """Command line of the tangler; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m annotated_moe.tangle",
        description="Write notebooks and package from the chapters.",
    )
    say = parser.add_argument
    say("--check", action="store_true", help="compare; write nothing")
    say("--root", type=Path, default=Path(), help="where the book is")
    say("--upto", type=int, metavar="NN", help="the last chapter")
    say("--into", type=Path, metavar="DIR", help="an empty folder")
    options = parser.parse_args(arguments)
    if (options.upto is None) != (options.into is None):
        parser.error("--upto and --into go together")
    try:
        lines = run_options(options)
    except TangleError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(lines) or "chapters, notebooks and package agree")
    return int(bool(lines) and options.check)


# %% book/chapters/90_tangle.md, cell 128
# A notebook is `__main__` as well, but it has no file.
if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main())
