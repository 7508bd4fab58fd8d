"""The tangler: what it refuses and where, and what it writes."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from annotated_moe import tangle

REPOSITORY = Path(__file__).parent.parent
CHAPTERS = sorted(REPOSITORY.glob("book/chapters/*.md"))
HEAD = """\
---
jupytext:
  formats: md:myst,ipynb
kernelspec:
  display_name: Python 3
  name: python3
annotated_moe:
  module: {module}
---

(the-{module})=
# A chapter

It promises {{ref}}`a result <the-{module}>` {{cite}}`knuth1984`.
Twice.

"""
FIRST = HEAD.count("\n") + 1  # the line of the first cell's fence


def page(*cells: str, module: str = "one", tags: str = "export") -> str:
    """A chapter; a cell that starts with a fence is taken as it is."""
    text = HEAD.format(module=module)
    for cell in cells:
        if not cell.startswith(("```", "~~~")):
            cell = f"```{{code-cell}} ipython3\n:tags: [{tags}]\n\n{cell}\n```\n"
        text += f"{cell}\n"
    return text


@pytest.fixture
def book(tmp_path):
    """Writes chapters by name into an empty book; returns its root."""
    (tmp_path / "book/chapters").mkdir(parents=True)
    config = "title: Tiny\nrepository:\n  url: https://example.org/tiny\n"
    (tmp_path / "_config.yml").write_text(config)

    def write(**chapters: str) -> Path:
        for name, text in chapters.items():
            path = tmp_path / f"book/chapters/{name}.md"
            path.write_text(text, encoding="utf-8")
        return tmp_path

    return write


def sync(root: Path) -> list[str]:
    return tangle.sync(root, tangle.tangle(root).outputs)


def check(root: Path) -> list[str]:
    return tangle.check(root, tangle.tangle(root).outputs)


def refusals(root: Path) -> list[str]:
    """What the tangler says; asserts that it writes nothing."""
    before = sorted(root.rglob("*"))
    with pytest.raises(tangle.TangleError) as info:
        sync(root)
    assert sorted(root.rglob("*")) == before
    return str(info.value).splitlines()


# Each case: the cells of a chapter, the line after the first cell's
# source line (0 is that line itself), and what the message must say.
REFUSED = {
    "undefined": (["x = missing"], 0, "defines `missing`"),
    "undefined, later": (["def f():\n    return missing"], 1, "`missing`"),
    "undefined in nested function": (
        ["def f():\n    def g():\n        return missing\n    return g"],
        2,
        "`missing`",
    ),
    "undefined in method": (
        ["class A:\n    x = 1\n\n    def f(self):\n        return x"],
        4,
        "`x`",
    ),
    "comprehension variable outside": (["[i for i in []]\nprint(i)"], 1, "`i`"),
    "annotation": (["def f(x: Missing): pass"], 0, "`Missing`"),
    "keyword-only annotation": (["def f(*, x: Missing): pass"], 0, "`Missing`"),
    "annotated field": (["class A:\n    x: Missing"], 1, "`Missing`"),
    "default": (["def f(x=missing): pass"], 0, "`missing`"),
    "decorator": (["@missing\ndef f(): pass"], 0, "`missing`"),
    "base class": (["class A(Missing): pass"], 0, "`Missing`"),
    "f-string": (["x = f'{missing}'"], 0, "`missing`"),
    "match": (["match 1:\n    case missing.x: pass"], 1, "`missing`"),
    "augmented": (["count += 1"], 0, "`count`"),
    "lambda": (["f = lambda: missing"], 0, "`missing`"),
    "deleted name": (["del missing"], 0, "`missing`"),
    "except": (["try: pass\nexcept Missing: pass"], 1, "`Missing`"),
    "too early": (["a = b\nb = 1"], 0, "used before line"),
    "too early, class": (["class A:\n    y = x\nx = 1"], 1, "used before line"),
    "too early, default": (["def f(y=x): pass\nx = 1"], 0, "used before line"),
    "own value": (["x = x"], 0, "used before line"),
    "own iterable": (["for x in x: pass"], 0, "used before line"),
    "own class": (["class A:\n    child: A"], 1, "used before line"),
    "twice": (["x = 1", "x = 2"], 6, "`x` is exported already, on line"),
    "twice, function": (["def f(): pass\ndef f(): pass"], 1, "exported already"),
    "twice, import": (["import os.path as p", "p = 1\nq = p"], 0, "defines `p` itself"),
    "mixed": (["import os\nx = os"], 0, "a cell of their own"),
    "unused": (["import os"], 0, "imported but unused"),
    "unused in a function": (["def f():\n    import os"], 1, "imported but unused"),
    "unused variable": (["def f():\n    x = 1"], 1, "never used"),
    "no string of axes": (["class Float: ...\nx: Float[int, 'N']"], 1, "`N`"),
    "quoted": (["def f(x: 'Missing'): pass"], 0, "`Missing`"),
    "export of nothing": (["__all__ = ['missing']"], 0, "`missing`"),
    "star": (["from os import *"], 0, "import *"),
    "relative": (["from .two import x"], 0, "relative import"),
    "syntax": (["x = 1\ny = = 2"], 1, "syntax error"),
    "syntax, last line": (["f("], 0, "syntax error"),
    "return outside": (["x = 1\nreturn x"], 1, "syntax error"),
    "newer Python": (["type X = int"], 0, "syntax error"),
    "magic": (["x = 1\n%timeit x"], 1, "magics cannot be exported"),
    "shell": (["!ls"], 0, "magics cannot be exported"),
    "no module": (
        ["import annotated_moe.nowhere", "x = annotated_moe"],
        6,
        "nowhere",
    ),
    "itself": (
        ["import annotated_moe.one", "def f(): return annotated_moe.one"],
        6,
        "import cycle",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_chapter_and_line(book, case):
    cells, offset, message = REFUSED[case]
    (line, *rest) = refusals(book(c1=page(*cells)))
    assert line.startswith(f"book/chapters/c1.md:{FIRST + 3 + offset}: ")
    assert message in line and not rest


ACCEPTED = {
    "later": "def f():\n    return g()\n\n\ndef g(): ...",
    "recursion": "class A:\n    def f(self):\n        return A()",
    "global": "def f():\n    global g\n    g = 1\n\n\ndef h():\n    return g",
    "nonlocal": (
        "def f():\n    x = 1\n\n    def g():\n        nonlocal x\n"
        "        x += 1\n        return x\n    return g"
    ),
    "walrus": "if any((n := i) > 1 for i in range(9)):\n    print(n)",
    "comprehension": "f = [a + b for a in range(3) for b in range(a) if a]",
    "class comprehension": "class A:\n    x = [1]\n    y = [i for i in x]",
    "match": (
        "def f(x, os):\n    match x:\n"
        "        case {'a': a, **rest}:\n            return a, rest\n"
        "        case [os.sep, *tail] | (*tail, 1):\n            return tail\n"
        "        case str() as s if s:\n            return s"
    ),
    "except": (
        "try:\n    import os\nexcept ImportError as error:\n    print(error)\n"
        "else:\n    print(os)"
    ),
    "either branch": (
        "try:\n    import os\nexcept ImportError:\n    os = None\nprint(os)"
    ),
    "with": "with open('x') as f, open(f.name) as g:\n    print(f, g)",
    "for": "for i, (j, *k) in enumerate([]):\n    print(i, j, k)\nelse:\n    i",
    "dunder": "if __name__ == '__main__' and __file__:\n    print(__doc__)",
    "super": "class A:\n    def f(self):\n        return super().f(), __class__",
    "lambda": "f = lambda a, /, b=1, *c, d, **e: (a, b, c, d, e)",
    "star args": "def f(*args: int, **kwargs: str): return args, kwargs",
    "async": "async def f():\n    async for x in g():\n        yield x\n\n\ng = f",
    "augmented": "x = 1\nx += 1",
    "underscore": "_ = 1\n_ = 2",
    "noqa": "def f():\n    import os  # noqa: F401",
    "annotated only": "class A:\n    x: int\n    y: list[int] = []",
    "import later": (
        "def f():\n    from annotated_moe.one import g\n    g()\n\n\ndef g(): ..."
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(book, case):
    root = book(c1=page(ACCEPTED[case]))
    sync(root)
    text = (root / "annotated_moe/one.py").read_text()
    assert text.endswith(f"cell 1\n{ACCEPTED[case]}\n")


# Faults of the page itself: the text, the line, the message.
PAGES = {
    "no header": ("# Title\n\nText.\n", 1, "annotated_moe: module:"),
    "no module": ("---\njupytext: 1\n---\n# T\n\nText.\n", 1, "module:"),
    "header is no YAML": ("---\na: [\n---\n# T\n\nText.\n", 2, "not YAML"),
    "no title": (page().replace("# A chapter", "A chapter"), FIRST - 5, "title"),
    "no opening": (
        "---\nannotated_moe: {module: one}\n---\n# T\n\n```\nx\n```\n",
        4,
        "a paragraph",
    ),
    "unclosed at the end": (page("```{code-cell}\nx = 1"), FIRST, "still open"),
    "unclosed before the next": (
        page("```{code-cell}\nx = 1\n\n```{code-cell}\nx = 2\n```"),
        FIRST,
        f"still open on line {FIRST + 3}",
    ),
    "unknown tag": (page("x = 1", tags="exprot"), FIRST, "unknown tag `exprot`"),
    "install tag": (page("x = 1", tags="install"), FIRST, "`install`"),
    "unknown option": (
        page("```{code-cell}\n:tag: [export]\n\nx = 1\n```"),
        FIRST,
        "unknown option `tag`",
    ),
    "tags not a list": (
        page("```{code-cell}\n:tags: export\n\nx = 1\n```"),
        FIRST,
        "takes a list",
    ),
    "options no YAML": (
        page("```{code-cell}\n---\nmystnb: {\n---\nx = 1\n```"),
        FIRST + 2,
        "not YAML",
    ),
    "module without export": (
        page("```{code-cell}\n:module: cli\n\nx = 1\n```"),
        FIRST,
        "tagged `export`",
    ),
    "module is no name": (
        page("```{code-cell}\n:tags: [export]\n:module: a-b\n\nx = 1\n```"),
        FIRST,
        "`a-b`",
    ),
    "syntax in a cell not exported": (
        page("```{code-cell}\nx = 1\ny = = 2\n```"),
        FIRST + 2,
        "syntax error",
    ),
}


@pytest.mark.parametrize("case", PAGES)
def test_page_refused(book, case):
    text, number, message = PAGES[case]
    (line,) = refusals(book(c1=text))
    assert line.startswith(f"book/chapters/c1.md:{number}: "), line
    assert message in line


def test_not_utf8(book):
    root = book()
    (root / "book/chapters/c1.md").write_bytes(b"\xff\xfe")
    assert refusals(root) == ["book/chapters/c1.md:1: not UTF-8"]


def test_says_where_the_name_is(book):
    text = page("```{code-cell}\nimport numpy as np\n```", "def f(): return np")
    (line,) = refusals(book(c1=text))
    assert f"; line {FIRST + 1} does, not exported" in line


def test_every_problem_is_reported_and_nothing_written(book):
    root = book(c1=page("x = 1"))
    sync(root)
    module = (root / "annotated_moe/one.py").read_bytes()
    book(c1=page("x = 2"), c2=page("y = a", module="two"), c3=page("z = b; c"))
    lines = refusals(root)
    assert [line.split(":")[0][-5:] for line in lines] == ["c2.md", "c3.md", "c3.md"]
    book(c3=page("z = b\nc", module="three"))
    assert [re.sub(r"\D+(\d).md:(\d+):.*", r"\1 \2", p) for p in refusals(root)] == [
        f"2 {FIRST + 3}",
        f"3 {FIRST + 3}",
        f"3 {FIRST + 4}",
    ]
    assert (root / "annotated_moe/one.py").read_bytes() == module


def test_cycle(book):
    first = page("from annotated_moe.two import g", "def f(): g()")
    second = ["from annotated_moe.three import h", "def g(): h()"]
    third = ["import annotated_moe.one", "def h(): return annotated_moe.one"]
    root = book(c1=first, c2=page(*second, module="two"))
    book(c3=page(*third, module="three"))
    (line,) = refusals(root)
    found = re.fullmatch(
        rf"book/chapters/c(\d).md:{FIRST + 9}: import cycle: (\w+) imports .*", line
    )
    assert found and {"1": "one", "2": "two", "3": "three"}[found[1]] == found[2]
    assert line.count("imports") == 3
    # The same import, put off until it is needed, closes no cycle.
    late = "def h():\n    import annotated_moe.one\n    return annotated_moe.one"
    book(c3=page(late, module="three"))
    with pytest.raises(tangle.TangleError, match="exported only later"):
        sync(root)


def test_cycle_through_the_front_door(book):
    door = "```{code-cell}\n:tags: [export]\n:module: __init__\n\n%s\n```"
    front = door % "from annotated_moe.one import f as f"
    text = page("import annotated_moe as am", "def f(): return am", front)
    (line,) = refusals(book(c1=text))
    assert line.startswith(f"book/chapters/c1.md:{FIRST + 9}: ")
    assert "import cycle" in line and "`" not in line
    assert "one" in line and "__init__" in line


def test_import_of_what_is_not_exported(book):
    second = "def f():\n    from annotated_moe.one import x, y\n    return x, y"
    root = book(c1=page("x = 1"), c2=page(second, module="two"))
    assert refusals(root) == [
        f"book/chapters/c2.md:{FIRST + 4}: `annotated_moe.one` exports no `y`"
    ]


def to(module: str, source: str) -> str:
    """A cell that is exported to another module than the chapter's."""
    return f"```{{code-cell}}\n:tags: [export]\n:module: {module}\n\n{source}\n```"


def about(text: str, **modules: str) -> str:
    """The page with sentences about modules in its header."""
    said = "".join(f"    {name}: {text}\n" for name, text in modules.items())
    return text.replace("\n---\n\n(the", f"\n  modules:\n{said}---\n\n(the", 1)


def body(root: Path, name: str) -> str:
    """A generated module without its header line and docstring."""
    text = (root / f"annotated_moe/{name}.py").read_text()
    return text[text.index('"""\n\n') + 5 :]


def test_imports_follow_use(book):
    """Each module gets what its own cells use, and what others define."""
    head = (
        "import os.path\nimport re\nfrom jaxtyping import Array, Float\n"
        "import os.path as p\nimport importlib.util\nimport importlib.metadata"
    )
    text = about(
        page(
            head,
            'def f(x: Float[Array, "B N"]): return p.join(x)',
            to("two", "def g(): return f(re.sub), importlib.util.find_spec"),
            to("three", "def h(): return os.path, importlib.metadata.version, g()"),
        ),
        two="Second.",
        three="Third.",
    )
    root = book(c1=text)
    sync(root)
    mark = "# %% book/chapters/c1.md, cell"
    assert body(root, "one") == (
        "import os.path as p\n\nfrom jaxtyping import Array, Float\n\n\n"
        f'{mark} 2\ndef f(x: Float[Array, "B N"]): return p.join(x)\n'
    )
    assert body(root, "two").startswith(
        "import importlib.util\nimport re\n\nfrom annotated_moe.one import f\n\n\n"
        f"{mark} 3\n"
    )
    assert body(root, "three").startswith(
        "import importlib.metadata\nimport os.path\n\n"
        "from annotated_moe.two import g\n\n\n"
    )


def test_a_module_of_two_chapters(book):
    """Cells in reading order, a header for each, no import of itself."""
    more = "from annotated_moe.one import f"
    later = to("one", "def g(): return f()")
    root = book(c1=page("def f(): ..."), c2=page(more, later, "k = 1", module="two"))
    sync(root)
    text = (root / "annotated_moe/one.py").read_text()
    assert text == (
        "# Generated from book/chapters/c1.md, book/chapters/c2.md by `make sync`; "
        'edit the chapters.\n"""It promises a result. Twice.\n"""\n\n'
        "# %% book/chapters/c1.md, cell 1\ndef f(): ...\n\n\n"
        "# %% book/chapters/c2.md, cell 2\ndef g(): return f()\n"
    )
    book(c2=page(later, "k = 1", module="two"))
    (line,) = refusals(root)
    assert line.startswith(f"book/chapters/c2.md:{FIRST + 4}: no exported cell")
    assert line.endswith("import it from `annotated_moe.one`")


def test_one_name_twice_in_a_module_or_in_a_chapter(book):
    root = book(c1=page("x = 1"), c2=page(to("one", "x = 2"), module="two"))
    (line,) = refusals(root)
    assert line == (
        f"book/chapters/c2.md:{FIRST + 4}: `x` is exported already, "
        f"on line {FIRST + 3} of book/chapters/c1.md"
    )
    text = about(page("x = 1", to("two", "x = 2")), two="Second.")
    (line,) = refusals(book(c1=text, c2=page("y = 1", module="three")))
    said = f"c1.md:{FIRST + 12}: `x` is exported already, on line {FIRST + 5}"
    assert line.endswith(said)


@pytest.mark.parametrize(
    "second, message",
    [("import json as tool", "`tool` is `re`"), ("tool = 1", "of book/chapters/c2.md")],
)
def test_one_name_of_two_meanings_in_a_module(book, second, message):
    cells = [second] if second.startswith("import") else []
    cells += [to("one", second if not cells else "b = tool")]
    root = book(c1=page("import re as tool", "a = tool"))
    book(c2=page(*cells, "y = 1", module="two"))
    (line,) = refusals(root)
    assert line.startswith("book/chapters/c") and message in line


def test_order_between_chapters_is_judged_in_the_module(book):
    """Each notebook is right; the module runs one cell too early."""
    early = "def f(): return 1\n\n\nx = f"
    root = book(c1=page(early), c2=page("y = 1", module="two"))
    book(c2=page("from annotated_moe.one import x", to("one", "y = x"), module="two"))
    sync(root)
    # `RULES` is there when the notebook of c2 imports it, and not yet when the
    # module gets to that cell: c1's cells were read before c2's, c3's after.
    book(c3=page("RULES = 1", module="one"))
    first = to("one", "z = RULES")
    book(c2=page("from annotated_moe.one import RULES", first, module="two"))
    with pytest.raises(tangle.TangleError, match=r"c2.md:\d+: undefined name 'RULES'"):
        tangle.tangle(root)


def test_a_name_that_a_cell_tries_to_import(book):
    """It belongs to the module of its cell, and others get it from there."""
    attempt = "try:\n    import tomllib\nexcept ImportError:\n    tomllib = None"
    text = page(attempt, to("two", "def f(): return tomllib"))
    root = book(c1=about(text, two="Second."))
    sync(root)
    assert "from annotated_moe.one import tomllib\n" in body(root, "two")


def test_sub_packages(book):
    text = about(
        page("def f(): ...", to("formats.pickles", "def g(): return f()")),
        **{"formats.pickles": "Pickles."},
    )
    second = page(
        "from annotated_moe.formats.pickles import g",
        "from annotated_moe.formats import pickles",
        "def h(): return g(), pickles.g",
        to("formats.__init__", "from annotated_moe.formats.pickles import g as g"),
        module="two",
    )
    root = book(c1=text, c2=second)
    done = [line for line in sync(root) if line.endswith(".py")]
    assert done == [
        "wrote annotated_moe/__init__.py",
        "wrote annotated_moe/formats/__init__.py",
        "wrote annotated_moe/formats/pickles.py",
        "wrote annotated_moe/one.py",
        "wrote annotated_moe/two.py",
    ]
    inner = (root / "annotated_moe/formats/__init__.py").read_text()
    assert inner == (
        "# Generated from book/chapters/c2.md by `make sync`; edit the chapter.\n"
        '"""The modules of `annotated_moe.formats`.\n"""\n\n'
        "from annotated_moe.formats.pickles import g as g\n"
    )
    code = "from annotated_moe.two import h; assert h()[0] is None"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
    (root / "book/chapters/c2.md").unlink()
    book(c1=page("def f(): ..."))
    assert "removed annotated_moe/formats/pickles.py" in sync(root)
    book(c2=page(to("one.x", "y = 1"), module="two"))
    assert "cannot be module and folder" in refusals(root)[0]


def test_a_module_without_a_sentence(book):
    text = page("x = 1", to("cli", "y = 1"))
    message = "no header says under `modules` what `cli` is"
    assert refusals(book(c1=text)) == [f"book/chapters/c1.md:{FIRST + 10}: {message}"]
    sync(book(c1=about(text, cli="The command line, *said* in {ref}`words <w>`.")))
    text = (book() / "annotated_moe/cli.py").read_text()
    assert ast.get_docstring(ast.parse(text)) == "The command line, *said* in words."
    (line,) = refusals(book(c1=about(page("x = 1"), cli="Nothing.")))
    assert line == "book/chapters/c1.md:1: no cell is exported to `cli`"


# Each case: cells of chapter 1, the line of the use after the first cell's
# source, and what chapter 2, module `two`, has that is used too early.
FORWARD = {
    "name": (["from annotated_moe.two import g", "def f(): return g()"], 6, "`g`"),
    "attribute": (
        ["from annotated_moe import two", "def f(): return two.g()"],
        6,
        "`g`",
    ),
    "dotted": (
        ["import annotated_moe.two", "def f(): return annotated_moe.two.g()"],
        6,
        "`g`",
    ),
    "module": (
        ["from annotated_moe import two", "def f(): return two"],
        0,
        "`annotated_moe.two`",
    ),
    "in a function": (
        ["def f():\n    from annotated_moe.two import g\n    return g"],
        1,
        "`g`",
    ),
    "the same module": (
        ["from annotated_moe.one import later", "def f(): return later"],
        6,
        "`later`",
    ),
    "class body": (
        ["from annotated_moe.two import g", "class A:\n    x = g"],
        7,
        "`g`",
    ),
}


@pytest.mark.parametrize("case", FORWARD)
def test_the_book_reads_forward(book, case):
    cells, offset, name = FORWARD[case]
    second = page("def g(): ...", to("one", "later = 1"), module="two")
    root = book(c1=page(*cells), c2=second)
    where = f"book/chapters/c1.md:{FIRST + 3 + offset}"
    message = f"{where}: {name} is exported only later, by book/chapters/c2.md"
    assert message in refusals(root)
    # In the other order there is nothing to refuse.
    (root / "book/chapters/c1.md").rename(root / "book/chapters/c3.md")
    assert tangle.tangle(root).outputs


def test_a_local_name_is_no_forward_use(book):
    cells = ["def f(g): return g", "def h():\n    g = 1\n    return g"]
    root = book(c1=page(*cells), c2=page("g = 1", module="two"))
    assert tangle.tangle(root).outputs


def test_large_modules_are_named(book, capsys):
    root = book(c1=page("x = 1"))
    assert tangle.main(["--root", str(root)]) == 0
    assert "annotated_moe/one.py has" in capsys.readouterr().err


def test_generated_modules_pass_ruff(book):
    """Heads sorted as ruff sorts them, in every case of the order."""
    head = (
        "from __future__ import annotations\nimport sys\nimport os\n"
        "import numpy as np\nimport jax.numpy as jnp\nimport jax\n"
        "from jax import numpy as inner, lax\nfrom jax.sharding import Mesh, "
        "PartitionSpec as P, NamedSharding, AxisType\nfrom os import path, "
        "O_RDONLY, PathLike, sep, altsep as b, abort as Z\n"
        "from collections import abc\n"
        "from haiku import get_parameter, get_state, Module, transform, "
        "transform_with_state\nfrom typing import Any"
    )
    names = (
        "annotations sys os np jnp jax inner lax Mesh P NamedSharding AxisType path "
        "O_RDONLY PathLike sep b Z abc get_parameter get_state Module transform "
        "transform_with_state Any f4 f10 llama4 llama10 llama"
    )
    own = "".join(f"from annotated_moe import {m}\n" for m in ["llama10", "llama4"])
    own += "import annotated_moe.llama as llama\nfrom annotated_moe.llama4 import f4\n"
    own += "from annotated_moe.llama10 import f10"
    text = f"NAMES = [\n{''.join(f'    {n},{chr(10)}' for n in names.split())}]"
    root = book(
        c1=page("def f4(): ...", module="llama4"),
        c2=page("def f10(): ...", module="llama10"),
        c3=page("def ff(): ...", module="llama"),
        c4=page(head, own, text),
    )
    (root / "annotated_moe").mkdir()
    sync(root)
    ruff = ["-m", "ruff", "check", "--select=E,F,I,UP", "--ignore=E501,E701"]
    ruff += ["--target-version=py311", "--isolated", "annotated_moe"]
    done = subprocess.run(
        [sys.executable, *ruff],
        cwd=root,
        capture_output=True,
        text=True,
    )
    head = (root / "annotated_moe/one.py").read_text()
    assert done.returncode == 0, done.stdout + head
    assert max(map(len, head.splitlines()[1:])) <= 72


def test_the_chapters_up_to_grok_know_of_no_other_family(tmp_path):
    script = REPOSITORY / "annotated_moe/tangle.py"
    subprocess.run(
        [sys.executable, "-P", script, "--root", REPOSITORY, "--upto", "8",
         "--into", tmp_path], check=True)  # fmt: skip
    modules = list(tmp_path.glob("annotated_moe/**/*.py"))
    assert tmp_path / "annotated_moe/generate.py" in modules
    names = re.compile(r"llama|mixtral|qwen|olmoe|\bvision", re.IGNORECASE)
    for module in modules:
        assert not names.search(module.read_text()), module


def test_a_prefix_of_the_book_is_a_program(book, tmp_path):
    """`make prefix`: imports all of it and runs the last notebook there."""
    use = "```{code-cell}\nimport annotated_moe.one as one\nassert one.%s\n```"
    names = {"01_one": page("x = 1", use % "x")}
    names["02_two"] = page("from annotated_moe.one import x", "y = x", module="two")
    names["03_three"] = page("assert one", module="three")
    root = book(**names)
    data = root / "annotated_moe/small/weights"
    data.parent.mkdir(parents=True)
    data.write_text("1")

    def prefix(number: str) -> subprocess.CompletedProcess:
        script = REPOSITORY / "scripts/prefix.py"
        into = root / ".prefix" / number
        return subprocess.run(
            [sys.executable, "-P", script, number, into, "--root", root],
            capture_output=True,
            text=True,
        )

    done = prefix("01")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 modules imported" in done.stdout and "1 passed" in done.stdout
    made = root / ".prefix/01/annotated_moe"
    assert not (made / "two.py").exists()
    assert (made / "small/weights").read_text() == "1"
    assert prefix("01").returncode == 0, "twice in one place"
    assert f"in {root}/.prefix/01: wrote annotated_moe/one.py" in done.stdout
    assert f"up to 01 is in {root}/.prefix/01\n" in done.stdout
    assert prefix("03").returncode != 0, "a chapter that cannot be tangled"
    for wrong in ("00", "0", "-1", "abc", "", "4"):
        done = prefix(wrong)
        assert done.returncode == 1 and done.stdout == "", wrong
        assert done.stderr == (
            f"N={wrong!r} is no chapter's number: N must be 01 to 03, as in"
            " make prefix N=08\n"
        )
    # The notebook is run, with what the prefix has and nothing else.
    book(**{"01_one": page("x = 1", use % "nothing")})
    assert prefix("01").returncode != 0
    # And the modules are imported.
    book(**{"01_one": page("def f(): return y\nx = f()\ny = 1")})
    done = prefix("01")
    assert done.returncode != 0 and "NameError" in done.stderr


def test_upto_needs_a_folder(book):
    with pytest.raises(SystemExit):
        tangle.main(["--root", str(book(c1=page("x = 1"))), "--upto", "1"])


def test_no_address(book):
    root = book(c1=page("x = 1"))
    (root / "_config.yml").write_text("title: x\n")
    assert refusals(root)[0].startswith("_config.yml:1: ")


def test_empty_book(book):
    assert refusals(book()) == ["book/chapters:1: no chapters here"]


def test_module_text(book):
    quiet = "```{code-cell}\nprint(1)\n```"
    shown = "````markdown\n```{code-cell}\n:tags: [export]\n\nbad(\n```\n````"
    front = to("cli", "y = x")
    text = page("x = 1", quiet, shown, "def f():\n    return x", front)
    root = book(c1=about(text, cli="The command line."))
    assert sorted(sync(root)) == [
        "wrote annotated_moe/__init__.py",
        "wrote annotated_moe/cli.py",
        "wrote annotated_moe/one.py",
        "wrote book/chapters/c1.ipynb",
    ]
    assert (root / "annotated_moe/one.py").read_text() == (
        "# Generated from book/chapters/c1.md by `make sync`; edit the chapter.\n"
        '"""It promises a result. Twice.\n"""\n\n'
        "# %% book/chapters/c1.md, cell 1\nx = 1\n\n\n"
        "# %% book/chapters/c1.md, cell 3\ndef f():\n    return x\n"
    )
    cli = (root / "annotated_moe/cli.py").read_text()
    assert ast.get_docstring(ast.parse(cli)) == "The command line."
    assert "# %% book/chapters/c1.md, cell 4\n" in cli


def test_docstring_of_mathematics(book):
    text = page("x = 1").replace("Twice.", r"As $\varepsilon$, \"x\".")
    sync(book(c1=text))
    module = (book() / "annotated_moe/one.py").read_text()
    assert 'r"""It promises' in module
    assert r"$\varepsilon$" in ast.get_docstring(ast.parse(module))


def test_notebook(book):
    text = page("```{code-cell}\n%config A.b = 1\n```", "x = 'é'").replace(
        "  module: one", "  module: one\n  needs: [jupytext]"
    )
    root = book(c1=text)
    sync(root)
    raw = (root / "book/chapters/c1.ipynb").read_bytes()
    notebook = json.loads(raw)
    import nbformat

    nbformat.validate(nbformat.from_dict(notebook))
    assert raw.endswith(b"}\n") and "é".encode() in raw and b"\r" not in raw
    first, second, *rest = notebook["cells"]
    assert all(list(part) == sorted(part) for part in [notebook, first, *rest])
    source = "".join(first["source"])
    assert first["id"] == "install" and second["id"] == "markdown-1"
    assert [cell["id"] for cell in rest] == ["code-1", "code-2"]
    assert '"annotated-moe @ git+https://example.org/tiny" "jupytext"' in source
    assert 'needed = ["annotated_moe", "jupytext"]' in source
    for cell in [first, *rest]:
        assert cell["outputs"] == [] and cell["execution_count"] is None
    body = raw.split(b'"nbformat"')[0]
    assert not re.search(rb"version|\d{4}-\d\d-\d\d", body)


def test_byte_stable_in_another_process(book):
    root = book(c1=page("x = {1: 'é', **{}}"), c2=page("y = 1", module="two"))
    sync(root)
    files = sorted(p for p in root.rglob("*") if p.is_file())
    before = [path.read_bytes() for path in files]
    for path in files:
        if path.suffix in (".py", ".ipynb"):
            path.unlink()
    script = REPOSITORY / "annotated_moe/tangle.py"
    subprocess.run(
        [sys.executable, "-P", script, "--root", root],
        env={**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo"},
        check=True,
        capture_output=True,
    )
    assert [path.read_bytes() for path in files] == before
    assert check(root) == [] and sync(root) == []


@pytest.mark.parametrize("change", ["edit", "newline", "delete"])
@pytest.mark.parametrize("name", ["annotated_moe/two.py", "book/chapters/c2.ipynb"])
def test_drift_is_named(book, capsys, name, change):
    root = book(c1=page("x = 1"), c2=page("y = 1", module="two"))
    assert tangle.main(["--root", str(root)]) == 0
    assert tangle.main(["--root", str(root), "--check"]) == 0
    path, before = root / name, (root / name).read_bytes()
    if change == "edit":
        path.write_bytes(before.replace(b"y = 1", b"y = 2"))
    elif change == "newline":
        path.write_bytes(before.replace(b"\n", b"\r\n"))
    else:
        path.unlink()
    capsys.readouterr()
    assert tangle.main(["--root", str(root), "--check"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"book/chapters/c2.md: {name} ")
    assert ("missing" in line) == (change == "delete")
    if change == "edit" and name.endswith(".py"):
        assert "differs from line 6 on" in line
    assert sync(root) == [f"wrote {name}"]
    assert path.read_bytes() == before


def test_error_exit(book, capsys):
    root = book(c1=page("x = y"))
    for arguments in [[], ["--check"]]:
        assert tangle.main(["--root", str(root), *arguments]) == 1
        captured = capsys.readouterr()
        assert "book/chapters/c1.md" in captured.err and not captured.out


def test_stale_files(book):
    root = book(c1=page("x = 1"), c2=page("y = 1", module="two"))
    sync(root)
    (root / "book/chapters/c2.md").unlink()
    gone = ["annotated_moe/two.py", "book/chapters/c2.ipynb"]
    assert check(root) == [f"{g}: no chapter makes this file" for g in gone]
    assert sync(root) == [f"removed {g}" for g in gone]
    assert not any((root / g).exists() for g in gone)


def test_a_file_written_by_hand_is_kept_and_refused(book):
    root = book(c1=page("x = 1"))
    sync(root)
    hand = root / "annotated_moe/hand.py"
    hand.write_text("x = 1\n")
    assert refusals(root)[0].startswith("annotated_moe/hand.py:1: ")
    assert hand.exists()


def test_jupytext_agrees_on_every_chapter():
    """`notebook_text` refuses a page that the two read differently."""
    pytest.importorskip("jupytext")
    for path in CHAPTERS:
        name = path.relative_to(REPOSITORY).as_posix()
        chapter = tangle.read_file(name, path)
        assert tangle.notebook_text(chapter, "https://example.org")


def test_a_page_read_differently_is_refused(book):
    """A cell in a list item: Jupytext takes it for text, we do not."""
    nested = "1. a\n\n   ```{code-cell}\n   # y = 1\n   ```\n"
    (line,) = refusals(book(c1=page("x = 1") + nested))
    assert line == "book/chapters/c1.md:1: Jupytext finds other code cells on this page"


@pytest.fixture(scope="module")
def here():
    """What the chapters of this book become."""
    return tangle.tangle(REPOSITORY).outputs


def test_the_tangler_tangles_itself(here, tmp_path):
    """The installed tangler and the one in the chapter agree to the byte."""
    (own,) = [o for o in here if o.path == "annotated_moe/tangle.py"]
    assert (REPOSITORY / own.path).read_text(encoding="utf-8") == own.text
    script = tmp_path / "tangle.py"
    script.write_text(own.text, encoding="utf-8")
    root = tmp_path / "copy"
    (root / "book/chapters").mkdir(parents=True)
    (root / "_config.yml").write_bytes((REPOSITORY / "_config.yml").read_bytes())
    for path in CHAPTERS:
        (root / "book/chapters" / path.name).write_bytes(path.read_bytes())
    subprocess.run(
        [sys.executable, "-P", script, "--root", root],
        check=True,
        capture_output=True,
    )
    for output in here:
        assert (root / output.path).read_bytes() == output.text.encode()


def test_no_drift(here):
    assert tangle.check(REPOSITORY, here) == []


PACKAGE = REPOSITORY / "annotated_moe"
MODULES = [
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
]


def test_importing_prints_nothing_and_starts_no_backend():
    names = [name.removesuffix(".__init__") for name in MODULES]
    code = (
        "import importlib, jax._src.xla_bridge as bridge\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "    assert not bridge._backends, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_tangler_needs_only_the_standard_library():
    code = (
        "import sys, runpy\n"
        f"runpy.run_path({str(REPOSITORY / 'annotated_moe/tangle.py')!r})\n"
        "heavy = {'jax', 'numpy', 'yaml', 'jupytext', 'haiku', 'pyflakes'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
