# Generated from book/chapters/19_vocabularies.md by `make sync`; edit the chapter.
"""A chat template is a program by a stranger. This module runs one in a
process of its own, and is that process.
"""

import importlib
import json
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# %% book/chapters/19_vocabularies.md, cell 21
MAX_SECONDS, MAX_BYTES, MAX_TEXT = 5, 2**30, 2**22


# %% book/chapters/19_vocabularies.md, cell 22
def sandbox(library: ModuleType, extension: Any) -> Any:
    """The environment that published templates are written for."""
    base: Any = library.sandbox.ImmutableSandboxedEnvironment

    class Strict(base):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise library.sandbox.SecurityError(
                f"the attribute {attribute!r} is not for templates"
            )

    def refuse(message: str) -> None:
        raise library.TemplateError(message)

    loops = "jinja2.ext.loopcontrols"
    env = Strict(trim_blocks=True, lstrip_blocks=True,
                 extensions=[loops, extension])
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = strftime_now
    return env


# %% book/chapters/19_vocabularies.md, cell 23
def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None,
    separators: Any = None, sort_keys: bool = False,
) -> str:
    """JSON without the escapes that Jinja adds for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent,
                      separators=separators, sort_keys=sort_keys)


# %% book/chapters/19_vocabularies.md, cell 24
def strftime_now(form: str) -> str:
    """Today, in the form that a template asks for."""
    return datetime.now().strftime(form)


# %% book/chapters/19_vocabularies.md, cell 25
def generation_tag(extension: Any) -> Any:
    """`{% generation %}` marks answers for training; prints them."""
    class Generation(extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            end = ["name:endgeneration"]
            return parser.parse_statements(end, drop_needle=True)

    return Generation


# %% book/chapters/19_vocabularies.md, cell 26
def render(
    template: str, variables: dict[str, Any], asked: list[str]
) -> dict[str, Any]:
    """Run a template here and now; only `render_apart` should.

    The "text", and those of the names `asked` that were "unread".
    """
    library, _, meta, ext = (importlib.import_module(name) for name in [
        "jinja2", "jinja2.sandbox", "jinja2.meta", "jinja2.ext"])
    env = sandbox(library, generation_tag(ext.Extension))
    read = meta.find_undeclared_variables(env.parse(template))
    text, size = [], 0
    for part in env.from_string(template).generate(**variables):
        text.append(part)
        size += len(part)
        if size > MAX_TEXT:
            raise ValueError(f"more than {MAX_TEXT:,} characters")
    unread = [name for name in asked if name not in read]
    return {"text": "".join(text), "unread": unread}


# %% book/chapters/19_vocabularies.md, cell 27
def limit_process() -> None:
    """Bound what this process may take, as far as the system can."""
    with suppress(ImportError):
        import resource

        for kind, most in [(resource.RLIMIT_CPU, MAX_SECONDS),
                           (resource.RLIMIT_AS, MAX_BYTES)]:
            with suppress(ValueError, OSError):
                resource.setrlimit(kind, (most, most))


# %% book/chapters/19_vocabularies.md, cell 28
def answer(request: str) -> dict[str, Any]:
    """`render` of a request, or the "error" that there was."""
    limit_process()
    try:
        return render(**json.loads(request))
    except MemoryError:
        return {"error": f"more than {MAX_BYTES:,} bytes of memory"}
    except Exception as error:              # it may do anything
        return {"error": str(error) or type(error).__name__}


# %% book/chapters/19_vocabularies.md, cell 29
def render_apart(
    template: str, variables: dict[str, Any], asked: list[str]
) -> dict[str, Any]:
    """`render` in a process of its own; ValueError says what failed."""
    request = json.dumps({
        "template": template, "variables": variables, "asked": asked})
    found = find_spec("annotated_moe.templates")
    command = [sys.executable, "-P", str(found and found.origin)]
    try:
        done = subprocess.run(
            command, input=request.encode(), capture_output=True,
            timeout=60 + MAX_SECONDS, check=True,
        )
        reply = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError):
        reply = {"error": f"more than {MAX_SECONDS} seconds, or died"}
    if "error" in reply:
        why = " ".join(reply["error"].split())[:200]
        raise ValueError(f"the chat template was stopped: {why}")
    return reply


# %% book/chapters/19_vocabularies.md, cell 30
if __name__ == "__main__" and "__file__" in globals():
    sys.stdout.write(json.dumps(answer(sys.stdin.read())))
