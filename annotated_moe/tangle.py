# Generated from book/chapters/90_tangle.md by `make sync`; edit the chapter.
"""A book that prints its own program holds every function twice, and
two copies drift apart: a fix lands in one while the other goes on being
read. This chapter builds the program that makes the second copy from
the first. It reads the chapters, refuses what would not work as a
package and says on which line, and writes the notebooks and the
package, byte for byte the same on every machine. Its own source is the
page you are reading.
"""

# %% book/chapters/90_tangle.md, cell 1
import argparse
import ast
import builtins
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any


# %% book/chapters/90_tangle.md, cell 7
@dataclass(frozen=True)
class Problem:
    """What is wrong, and the file and line to look at."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


# %% book/chapters/90_tangle.md, cell 8
class TangleError(Exception):
    """Carries every `Problem` found. Nothing has been written."""

    def __init__(self, problems: list[Problem]):
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


# %% book/chapters/90_tangle.md, cell 10
FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,}) *(.*?) *$")


# %% book/chapters/90_tangle.md, cell 11
@dataclass(frozen=True)
class Fence:
    """A fenced block: where it opens, its info string, its body."""

    line: int
    info: str
    body: list[str]


# %% book/chapters/90_tangle.md, cell 12
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


# %% book/chapters/90_tangle.md, cell 15
@dataclass(frozen=True)
class Cell:
    """A code cell, counted from 1; `source` starts at `line`."""

    number: int
    line: int
    source: str
    tags: tuple[str, ...] = ()
    module: str = ""


# %% book/chapters/90_tangle.md, cell 16
def split_options(body: list[str]) -> tuple[str, int]:
    """The YAML at the head of a cell, and how many lines it takes."""
    if body[:1] == ["---"] and "---" in body[1:]:
        end = body.index("---", 1)
        return "\n".join(body[:end]), end + 1
    end = 0
    while end < len(body) and body[end].startswith(":"):
        end += 1
    return "\n".join(line[1:] for line in body[:end]), end


# %% book/chapters/90_tangle.md, cell 17
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


# %% book/chapters/90_tangle.md, cell 18
TAGS = ["export", "check", "raises-exception"]
TAGS += ["hide-input", "hide-output", "hide-cell"]
TAGS += ["remove-input", "remove-output", "remove-cell"]
OPTIONS = ["tags", "module", "mystnb"]


# %% book/chapters/90_tangle.md, cell 19
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
    if module and not str(module).isidentifier():
        return f"`{module}` cannot be the name of a module"
    return ""


# %% book/chapters/90_tangle.md, cell 20
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


# %% book/chapters/90_tangle.md, cell 21
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
    """One page: its text, the module it owns, its code cells."""

    path: str
    text: str
    module: str
    needs: tuple[str, ...]
    opening: str
    cells: tuple[Cell, ...]


# %% book/chapters/90_tangle.md, cell 26
def read_chapter(path: str, text: str) -> Chapter:
    """Read a page of MyST; raises `TangleError` where it cannot."""
    lines = text.splitlines()
    fenced = lines[:1] == ["---"] and "---" in lines[1:]
    end = lines.index("---", 1) if fenced else 0
    header = parse_yaml(path, 2, "\n".join(lines[1:end]))
    ours = header.get("annotated_moe")
    ours = ours if isinstance(ours, dict) else {}
    if not str(ours.get("module", "")).isidentifier():
        message = "the header names no `annotated_moe: module:`"
        raise TangleError([Problem(path, 1, message)])
    return Chapter(
        path=path,
        text=text,
        module=ours["module"],
        needs=tuple(map(str, ours.get("needs") or [])),
        opening=opening(path, lines, end + 1),
        cells=tuple(read_cells(path, lines)),
    )


# %% book/chapters/90_tangle.md, cell 28
@dataclass(eq=False)
class Scope:
    """A module, class, function or comprehension: what it binds."""

    kind: str
    names: set[str] = field(default_factory=set)
    globals: set[str] = field(default_factory=set)
    nonlocals: set[str] = field(default_factory=set)


# %% book/chapters/90_tangle.md, cell 29
GIVEN = frozenset(dir(builtins)) | {"__file__", "__class__"}


def home(name: str, scopes: tuple[Scope, ...]) -> Scope | None:
    """The scope that binds `name`, seen from the innermost one."""
    if name in scopes[-1].globals:
        scopes = scopes[:1]
    for scope in reversed(scopes):
        hidden = scope.kind == "class" and scope is not scopes[-1]
        if name in scope.names and not hidden:
            return scope
    return None


# %% book/chapters/90_tangle.md, cell 30
def visible(name: str, scopes: tuple[Scope, ...]) -> bool:
    """Whether `name` is bound by some scope or by Python itself."""
    return name in GIVEN or home(name, scopes) is not None


# %% book/chapters/90_tangle.md, cell 31
@dataclass(frozen=True)
class Import:
    """`from module import name`; for `import module`, no name."""

    module: str
    name: str
    line: int
    now: bool


# %% book/chapters/90_tangle.md, cell 32
Use = tuple[str, int, tuple[Scope, ...]]


# %% book/chapters/90_tangle.md, cell 33
@dataclass
class Ledger:
    """The scopes open at this point, and what was found so far."""

    scopes: tuple[Scope, ...] = ()
    bound: list[tuple[str, int]] = field(default_factory=list)
    later: list[Use] = field(default_factory=list)
    unknown: list[tuple[str, int]] = field(default_factory=list)
    imports: list[Import] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)


# %% book/chapters/90_tangle.md, cell 34
def deferred(ledger: Ledger) -> bool:
    """Whether this code runs only when some function is called."""
    return any(scope.kind == "function" for scope in ledger.scopes)


# %% book/chapters/90_tangle.md, cell 35
def use(ledger: Ledger, name: str, line: int) -> None:
    """Look `name` up: now, or after the last cell if it runs later."""
    if deferred(ledger):
        ledger.later.append((name, line, ledger.scopes))
    elif not visible(name, ledger.scopes):
        ledger.unknown.append((name, line))


# %% book/chapters/90_tangle.md, cell 36
def bind(ledger: Ledger, name: str, line: int) -> None:
    """Record that `name` is bound here."""
    scope = ledger.scopes[-1]
    if name in scope.globals:
        scope = ledger.scopes[0]
    if name not in scope.nonlocals:
        scope.names.add(name)
    if scope is ledger.scopes[0] and not deferred(ledger):
        ledger.bound.append((name, line))


# %% book/chapters/90_tangle.md, cell 37
def inside(ledger: Ledger, scope: Scope, nodes: list[Any]) -> None:
    """Walk `nodes` in a new innermost scope."""
    outer = ledger.scopes
    ledger.scopes = (*outer, scope)
    for node in nodes:
        walk(ledger, node)
    ledger.scopes = outer


# %% book/chapters/90_tangle.md, cell 38
def walk_function(ledger: Ledger, node: Any) -> None:
    """A `def` or `lambda`: its header runs now, its body later."""
    args = node.args
    every = [*args.posonlyargs, *args.args, args.vararg]
    every += [*args.kwonlyargs, args.kwarg]
    for part in getattr(node, "decorator_list", []):
        walk(ledger, part)
    walk(ledger, args)
    if getattr(node, "returns", None):
        walk(ledger, node.returns)
    if hasattr(node, "name"):
        bind(ledger, node.name, node.lineno)
    scope = Scope("function", {arg.arg for arg in every if arg})
    body = node.body if isinstance(node.body, list) else [node.body]
    inside(ledger, scope, body)


# %% book/chapters/90_tangle.md, cell 39
def walk_class(ledger: Ledger, node: ast.ClassDef) -> None:
    """A `class`: its body runs now, in a scope methods cannot see."""
    for part in [*node.decorator_list, *node.bases, *node.keywords]:
        walk(ledger, part)
    scope = Scope("class", {"__qualname__", "__module__"})
    inside(ledger, scope, node.body)
    bind(ledger, node.name, node.lineno)


# %% book/chapters/90_tangle.md, cell 40
def walk_comprehension(ledger: Ledger, node: Any) -> None:
    """Only the first iterable is evaluated in the outer scope."""
    first, *rest = node.generators
    walk(ledger, first.iter)
    parts = [first.target, *first.ifs, *rest]
    for part in ["key", "value", "elt"]:
        parts += [getattr(node, part)] if hasattr(node, part) else []
    inside(ledger, Scope("comprehension"), parts)


# %% book/chapters/90_tangle.md, cell 41
def walk_walrus(ledger: Ledger, node: ast.NamedExpr) -> None:
    """`:=` binds in the scope around any comprehensions."""
    walk(ledger, node.value)
    inner = ledger.scopes
    while ledger.scopes[-1].kind == "comprehension":
        ledger.scopes = ledger.scopes[:-1]
    bind(ledger, node.target.id, node.lineno)
    ledger.scopes = inner


# %% book/chapters/90_tangle.md, cell 42
def walk_import(ledger: Ledger, node: Any) -> None:
    """An import binds names, and is an edge between modules."""
    line, now = node.lineno, not deferred(ledger)
    source = getattr(node, "module", None) or ""
    if getattr(node, "level", 0):
        message = "a notebook has no package for a relative import"
        ledger.refused.append((line, message))
    for alias in node.names:
        name = alias.name if source else ""
        link = Import(source or alias.name, name, line, now)
        ledger.imports.append(link)
        if name == "*":
            message = "`import *` hides where names come from"
            ledger.refused.append((line, message))
        bound = alias.name if source else alias.name.split(".")[0]
        bind(ledger, alias.asname or bound, line)


# %% book/chapters/90_tangle.md, cell 43
ORDER: dict[type, tuple[str, ...]] = {
    ast.Assign: ("value", "targets"),
    ast.AugAssign: ("value", "target"),
    ast.For: ("iter", "target", "body", "orelse"),
    ast.AsyncFor: ("iter", "target", "body", "orelse"),
    ast.comprehension: ("iter", "target", "ifs"),
}


# %% book/chapters/90_tangle.md, cell 44
CAPTURES: dict[type, str] = {
    ast.ExceptHandler: "name",
    ast.MatchAs: "name",
    ast.MatchStar: "name",
    ast.MatchMapping: "rest",
}


# %% book/chapters/90_tangle.md, cell 45
def walk_parts(ledger: Ledger, node: ast.AST) -> None:
    """The children of `node`, in the order Python evaluates them."""
    captured = getattr(node, CAPTURES.get(type(node), ""), None)
    if captured:
        bind(ledger, captured, getattr(node, "lineno", 0))
    for part in ORDER.get(type(node), node._fields):
        child = getattr(node, part, None)
        for item in child if isinstance(child, list) else [child]:
            if isinstance(item, ast.AST):
                walk(ledger, item)


# %% book/chapters/90_tangle.md, cell 46
def walk_rest(ledger: Ledger, node: ast.AST) -> None:
    """Declarations; then whatever is no more than its parts."""
    match node:
        case ast.Global(names=names):
            ledger.scopes[-1].globals.update(names)
        case ast.Nonlocal(names=names):
            ledger.scopes[-1].nonlocals.update(names)
        case ast.AnnAssign(value=None, target=ast.Name()):
            walk(ledger, node.annotation)
        case ast.AnnAssign():
            for part in [node.annotation, node.value, node.target]:
                if part is not None:
                    walk(ledger, part)
        case ast.AugAssign(target=ast.Name(id=name)):
            use(ledger, name, node.lineno)
            walk_parts(ledger, node)
        case _:
            walk_parts(ledger, node)


# %% book/chapters/90_tangle.md, cell 47
def walk(ledger: Ledger, node: ast.AST) -> None:
    """Visit code as Python runs it, and keep the ledger."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()):
            bind(ledger, name, node.lineno)
        case ast.Name(id=name):
            use(ledger, name, node.lineno)
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
            walk_function(ledger, node)
        case ast.ClassDef():
            walk_class(ledger, node)
        case ast.ListComp() | ast.SetComp() | ast.DictComp():
            walk_comprehension(ledger, node)
        case ast.GeneratorExp():
            walk_comprehension(ledger, node)
        case ast.NamedExpr():
            walk_walrus(ledger, node)
        case ast.Import() | ast.ImportFrom():
            walk_import(ledger, node)
        case _:
            walk_rest(ledger, node)


# %% book/chapters/90_tangle.md, cell 53
@dataclass
class Module:
    """A module to be: its chapter, its cells, what they define."""

    name: str
    chapter: Chapter
    cells: list[Cell] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    exports: dict[str, int] = field(default_factory=dict)


# %% book/chapters/90_tangle.md, cell 54
def gather(chapters: list[Chapter]) -> dict[str, Module]:
    """Sort the exported cells of all chapters into modules."""
    modules: dict[str, Module] = {}
    problems = []
    for chapter in chapters:
        for cell in chapter.cells:
            if "export" not in cell.tags:
                continue
            name = cell.module or chapter.module
            module = modules.setdefault(name, Module(name, chapter))
            module.cells.append(cell)
            if module.chapter is not chapter:
                message = f"`{name}` belongs to {module.chapter.path}"
                problem = Problem(chapter.path, cell.line, message)
                problems.append(problem)
    if problems:
        raise TangleError(problems)
    return modules


# %% book/chapters/90_tangle.md, cell 55
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


# %% book/chapters/90_tangle.md, cell 56
def twice(module: Module, new: dict[str, int]) -> list[Problem]:
    """Names that an earlier statement of the module binds already."""
    problems = []
    for name, line in new.items():
        first = module.exports.setdefault(name, line)
        if first != line and name != "_":
            message = f"`{name}` is exported already, on line {first}"
            problem = Problem(module.chapter.path, line, message)
            problems.append(problem)
    return problems


# %% book/chapters/90_tangle.md, cell 57
def private(chapter: Chapter) -> dict[str, int]:
    """The names that only cells without `export` bind, and where."""
    found: dict[str, int] = {}
    for cell in chapter.cells:
        ledger = Ledger(scopes=(Scope("module"),))
        if "export" not in cell.tags:
            tree = ast.parse(without_magics(cell.source))
            ast.increment_lineno(tree, cell.line - 1)
            walk(ledger, tree)
        for name, line in ledger.bound:
            found.setdefault(name, line)
    return found


# %% book/chapters/90_tangle.md, cell 58
MAGIC = re.compile(r"^([ \t]*)[%!].*$", re.MULTILINE)


# %% book/chapters/90_tangle.md, cell 59
def without_magics(source: str) -> str:
    """A notebook cell as plain Python; nothing, if it is not that."""
    for code in [source, MAGIC.sub(r"\1pass", source)]:
        try:
            ast.parse(code)
            return code
        except SyntaxError:
            pass
    return ""


# %% book/chapters/90_tangle.md, cell 60
def undefined(module: Module) -> list[Problem]:
    """Names that no exported cell of the module defines in time."""
    path, ledger = module.chapter.path, module.ledger
    names = dict.fromkeys(ledger.unknown)
    for name, line, scopes in ledger.later:
        if not visible(name, scopes):
            names[name, line] = None
    elsewhere = private(module.chapter) if names else {}
    problems = [Problem(path, *refused) for refused in ledger.refused]
    for name, line in names:
        message = f"no exported cell defines `{name}`"
        if name in module.exports:
            first = module.exports[name]
            message = f"`{name}` is used before line {first} defines it"
        elif name in elsewhere:
            message += f"; line {elsewhere[name]} does, not exported"
        problems.append(Problem(path, line, message))
    return problems


# %% book/chapters/90_tangle.md, cell 61
def study(module: Module) -> list[Problem]:
    """Read a module's cells into its ledger; say what is wrong."""
    ledger, problems = module.ledger, []
    ledger.scopes = (Scope("module"),)
    for cell in module.cells:
        try:
            tree = parse(module.chapter.path, cell)
        except TangleError as error:
            problems += error.problems
            continue
        for statement in tree.body:
            seen = len(ledger.bound)
            walk(ledger, statement)
            if not isinstance(statement, ast.AugAssign):
                new = dict(reversed(ledger.bound[seen:]))
                problems += twice(module, new)
    return problems + undefined(module)


# %% book/chapters/90_tangle.md, cell 69
PACKAGE = "annotated_moe"


# %% book/chapters/90_tangle.md, cell 70
def target(link: Import, modules: dict[str, Module]) -> tuple[str, str]:
    """The module of ours, and the name in it, that an import means."""
    if link.module == PACKAGE and link.name in modules:
        return link.name, ""
    _, _, module = link.module.partition(".")
    return module or "__init__", link.name


# %% book/chapters/90_tangle.md, cell 71
Edges = dict[tuple[str, str], tuple[str, int]]


# %% book/chapters/90_tangle.md, cell 72
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


# %% book/chapters/90_tangle.md, cell 73
def links(modules: dict[str, Module]) -> list[Problem]:
    """Imports among our modules that lead nowhere or in a circle."""
    problems: list[Problem] = []
    edges: Edges = {}
    for name, module in sorted(modules.items()):
        path = module.chapter.path
        for link in module.ledger.imports:
            if link.module.split(".")[0] != PACKAGE:
                continue
            other, wanted = target(link, modules)
            if other not in modules:
                message = f"no chapter exports `{PACKAGE}.{other}`"
                problems.append(Problem(path, link.line, message))
            elif wanted and wanted not in modules[other].exports:
                message = f"`{PACKAGE}.{other}` exports no `{wanted}`"
                problems.append(Problem(path, link.line, message))
            elif link.now:
                edges.setdefault((name, other), (path, link.line))
    return problems + circle(edges)


# %% book/chapters/90_tangle.md, cell 78
def plain(text: str) -> str:
    """Prose without MyST roles, citations and links."""
    text = re.sub(r"\s*\{cite[^}]*\}`[^`]*`", "", text)
    text = re.sub(r"\{[^}]*\}`([^`<]*?)\s*(<[^>]*>)?`", r"\1", text)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


# %% book/chapters/90_tangle.md, cell 79
def docstring(chapter: Chapter) -> str:
    """The opening paragraph of a chapter as a module docstring."""
    text = plain(chapter.opening).replace('"""', "'''")
    filled = textwrap.fill(
        text,
        width=72,
        initial_indent='r"""' if "\\" in text else '"""',
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f'{filled}\n"""'


# %% book/chapters/90_tangle.md, cell 80
def module_text(module: Module) -> str:
    """The Python file of a module."""
    path = module.chapter.path
    head = f"# Generated from {path} by `make sync`; edit the chapter."
    own = ast.get_docstring(ast.parse(module.cells[0].source))
    head += "\n" if own else f"\n{docstring(module.chapter)}\n\n"
    blocks = [
        f"# %% {path}, cell {cell.number}\n{cell.source}\n"
        for cell in module.cells
    ]
    return head + "\n\n".join(blocks)


# %% book/chapters/90_tangle.md, cell 86
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


# %% book/chapters/90_tangle.md, cell 87
INSTALL = """\
# Fetch what is missing. Where everything is installed, do nothing.
import importlib.util

needed = {needed}
if not all(importlib.util.find_spec(name) for name in needed):
    %pip install -q {requirements}"""


# %% book/chapters/90_tangle.md, cell 88
def install_cell(chapter: Chapter, address: str) -> str:
    """The first cell of a notebook: installs the package if missing."""
    wanted = [f"annotated-moe @ git+{address}", *chapter.needs]
    return INSTALL.format(
        needed=json.dumps([PACKAGE, *chapter.needs]),
        requirements=" ".join(f'"{name}"' for name in wanted),
    )


# %% book/chapters/90_tangle.md, cell 89
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


# %% book/chapters/90_tangle.md, cell 90
METADATA = {
    "jupytext": {"formats": "md:myst,ipynb"},
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}


# %% book/chapters/90_tangle.md, cell 91
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


# %% book/chapters/90_tangle.md, cell 94
@dataclass(frozen=True)
class Output:
    """A generated file, and the chapter it comes from."""

    path: str
    text: str
    chapter: str


# %% book/chapters/90_tangle.md, cell 95
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


# %% book/chapters/90_tangle.md, cell 96
def read_book(root: Path) -> list[Chapter]:
    """Every chapter under `root`, or the problems of all of them."""
    chapters: list[Chapter] = []
    problems: list[Problem] = []
    for file in sorted(root.glob("book/chapters/*.md")):
        path = file.relative_to(root).as_posix()
        try:
            chapters.append(read_file(path, file))
        except TangleError as error:
            problems += error.problems
    if not chapters and not problems:
        problems.append(Problem("book/chapters", 1, "no chapters here"))
    if problems:
        raise TangleError(problems)
    return chapters


# %% book/chapters/90_tangle.md, cell 97
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


# %% book/chapters/90_tangle.md, cell 98
def judge(modules: dict[str, Module]) -> None:
    """Raises `TangleError` with every problem of every module."""
    problems: list[Problem] = []
    for name in sorted(modules):
        problems += study(modules[name])
    problems = problems or links(modules)
    if problems:
        problems.sort(key=lambda problem: (problem.path, problem.line))
        raise TangleError(problems)


# %% book/chapters/90_tangle.md, cell 99
def tangle(root: Path) -> list[Output]:
    """Every generated file of the book under `root`; writes nothing.

    Raises `TangleError` with every problem of every chapter.
    """
    chapters, address = read_book(root), repository(root)
    modules, outputs = gather(chapters), []
    judge(modules)
    for name, module in sorted(modules.items()):
        text, source = module_text(module), module.chapter.path
        outputs.append(Output(f"{PACKAGE}/{name}.py", text, source))
    for chapter in chapters:
        path = chapter.path.removesuffix(".md") + ".ipynb"
        text = notebook_text(chapter, address)
        outputs.append(Output(path, text, chapter.path))
    return outputs


# %% book/chapters/90_tangle.md, cell 100
def stale(root: Path, outputs: list[Output]) -> list[str]:
    """Generated files whose chapter no longer produces them.

    Raises `TangleError` for a file that was written by hand.
    """
    files = [*root.glob(f"{PACKAGE}/*.py")]
    files += root.glob("book/chapters/*.ipynb")
    paths = {path.relative_to(root).as_posix() for path in files}
    extra = sorted(paths - {output.path for output in outputs})
    for path in extra:
        text = (root / path).read_text(encoding="utf-8")
        if "# Generated from" not in text and '"install"' not in text:
            message = "no chapter exports this file; move it into one"
            raise TangleError([Problem(path, 1, message)])
    return extra


# %% book/chapters/90_tangle.md, cell 101
def current(root: Path, output: Output) -> str | None:
    """What stands in the place of `output` now, to the byte."""
    path = root / output.path
    return path.read_bytes().decode("utf-8") if path.exists() else None


# %% book/chapters/90_tangle.md, cell 102
def sync(root: Path) -> list[str]:
    """Bring the generated files up to date; say what was done."""
    outputs = tangle(root)
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


# %% book/chapters/90_tangle.md, cell 103
def check(root: Path) -> list[str]:
    """What `sync` would change, and the chapter it would follow."""
    outputs = tangle(root)
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


# %% book/chapters/90_tangle.md, cell 108
def main(arguments: list[str] | None = None) -> int:
    """Command line of the tangler; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m annotated_moe.tangle",
        description="Write notebooks and package from the chapters.",
    )
    say = parser.add_argument
    say("--check", action="store_true", help="compare; write nothing")
    say("--root", type=Path, default=Path(), help="where the book is")
    options = parser.parse_args(arguments)
    try:
        lines = (check if options.check else sync)(options.root)
    except TangleError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(lines) or "chapters, notebooks and package agree")
    return int(bool(lines) and options.check)


# %% book/chapters/90_tangle.md, cell 109
# A notebook is `__main__` as well, but it has no file.
if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main())
