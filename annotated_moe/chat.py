# Generated from book/chapters/19_vocabularies.md by `make sync`; edit the chapter.
"""An instruct model reads a conversation in the form that it was
trained on, and that form is a program that came with the weights. This
chapter runs it. By the end the program cannot reach your files, a
message of 49 characters can no longer put words into the mouth of the
system, you have measured what a token before the first word is good
for, and one class opens the tokenizers of Llama, Mixtral, Qwen and
OLMoE.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from annotated_moe.templates import render_apart
from annotated_moe.tokenizer import (
    Tokenizer,
    needed,
    parse_json,
    read_settings,
    replace_all,
    token_text,
)


# %% book/chapters/19_vocabularies.md, cell 14
def template_files(companions: Mapping[str, bytes]) -> dict[str, str]:
    """Name -> template, of those that are files of their own."""
    found = {}
    for path, data in companions.items():
        if path.endswith(".jinja"):
            name = path.split("/")[-1].removesuffix(".jinja")
            name = "default" if path == "chat_template.jinja" else name
            found[name] = data.decode("utf-8", "replace")
    return found


# %% book/chapters/19_vocabularies.md, cell 15
def named_templates(companions: Mapping[str, bytes]) -> dict[str, str]:
    """Name -> chat template; one without a name is the "default"."""
    if files := template_files(companions):
        return files
    found = read_settings(companions).get("chat_template")
    if "chat_template.json" in companions:
        data = companions["chat_template.json"]
        new = parse_json(data, "'chat_template.json'", "JSON")
        found = new.get("chat_template", found)
    if not isinstance(found, list):
        return {"default": found} if isinstance(found, str) else {}
    named = [part for part in found if isinstance(part, dict)]
    return {str(t.get("name")): str(t.get("template")) for t in named}


# %% book/chapters/19_vocabularies.md, cell 16
def pick_template(
    companions: Mapping[str, bytes], name: str | None, tools: Any
) -> tuple[str, str]:
    """A template's name and text; `name` may be a template itself."""
    known = named_templates(companions)
    if name is None:
        use = tools is not None and "tool_use" in known
        name = "tool_use" if use else "default"
    if name in known:
        return name, known[name]
    if "{{" in name or "{%" in name:
        return "given", name
    raise ValueError(
        f"this tokenizer has no chat template {name!r} beside it "
        f"(it has {sorted(known) or 'none'}): add a "
        "chat_template.jinja, or give plain text instead"
    )


# %% book/chapters/19_vocabularies.md, cell 33
PRIVATE = range(0xF0000, 0xFFFFE)           # characters without meaning


def stand_ins(marks: Iterable[str], used: str) -> dict[str, str]:
    """A private character for each of `marks`, none of them `used`."""
    taken = set(used)
    free = (chr(code) for code in PRIVATE if chr(code) not in taken)
    return dict(zip(marks, free))


# %% book/chapters/19_vocabularies.md, cell 34
def disarm(value: Any, hide: Callable[[str], str]) -> Any:
    """The same messages, every string in them seen by `hide`."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        return {disarm(k, hide): disarm(v, hide)
                for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [disarm(part, hide) for part in value]
    return value


# %% book/chapters/19_vocabularies.md, cell 35
def typed_text(messages: Any, given: dict[str, Any]) -> str:
    """All that was typed; ValueError for what is no conversation."""
    rows = isinstance(messages, (list, tuple)) and messages
    if not rows or not all(isinstance(m, dict) for m in messages):
        raise ValueError(
            "messages must be a list of tables such as "
            "{'role': 'user', 'content': 'Hello'}"
        )
    typed: list[str] = []

    def note(text: str) -> str:
        typed.append(text)
        return text

    disarm([messages, given], note)
    text = "\n".join(typed)
    try:
        json.dumps([messages, given])
        text.encode()                       # or half a character
    except (TypeError, ValueError) as error:
        raise ValueError(f"messages must be JSON: {error}") from None
    return text


# %% book/chapters/19_vocabularies.md, cell 36
def token_names(tokenizer: Tokenizer) -> dict[str, str]:
    """`bos_token` and its kin, which templates print."""
    names = {i: s for s, i in tokenizer.backend.specials.items()}
    roles = tokenizer.backend.roles
    own = {f"{role}_token": names[i]
           for role, i in roles.items() if i in names}
    settings = read_settings(tokenizer.companions)
    return own | {k: token_text(v) for k, v in settings.items()
                  if k.endswith("_token") and token_text(v)}


# %% book/chapters/19_vocabularies.md, cell 37
def mark_end(messages: list[Any], mark: str) -> list[Any]:
    """The messages, `mark` and a space behind the last one's text."""
    *before, last = messages
    content = last.get("content")
    if isinstance(content, str):
        return [*before, {**last, "content": f"{content}{mark} "}]
    parts = list(content) if isinstance(content, list) else []
    for i, part in reversed([*enumerate(parts)]):
        if isinstance(part, dict) and "text" in part:
            parts[i] = {**part, "text": f"{part['text']}{mark} "}
            return [*before, {**last, "content": parts}]
    raise ValueError("the last message has no text to continue")


# %% book/chapters/19_vocabularies.md, cell 38
def cut_at_end(text: str, mark: str) -> str:
    """What stands before the last `mark`."""
    if mark not in text:
        raise ValueError("the chat template drops the last message")
    before, _, after = text.rpartition(mark)
    return before if after[:1] == " " else before.rstrip()


# %% book/chapters/19_vocabularies.md, cell 39
def chat_text(
    tokenizer: Tokenizer, template: str, messages: Any, goes_on: bool,
    asked: list[str], variables: dict[str, Any],
) -> tuple[str, dict[str, str], list[str]]:
    """The rendered text, what private characters in it stand for, and
    which of the variables `asked` the template does not read."""
    needed("jinja2", "a chat template")
    typed = typed_text(messages, variables)
    forged = [s for s in tokenizer.backend.specials if s in typed]
    hidden = stand_ins([*forged, ""], template + typed)
    end = hidden.pop("")                    # of the last message
    messages = [{k: v for k, v in m.items() if v is not None}
                for m in messages]
    if goes_on:
        messages = mark_end(messages, end)
    safe = disarm({"messages": messages, **variables},
                  lambda text: replace_all(text, hidden))
    done = render_apart(template, token_names(tokenizer) | safe, asked)
    text = cut_at_end(done["text"], end) if goes_on else done["text"]
    return text, {c: s for s, c in hidden.items()}, done["unread"]


# %% book/chapters/19_vocabularies.md, cell 40
def refuse_unread(unread: list[str], name: str) -> None:
    """ValueError for a name that a template does not read.

    Tools and documents are offered to every template, so for them
    there is a warning.
    """
    for option in unread:
        text = f"the chat template {name!r} does not read {option!r}"
        if option not in ("tools", "documents"):
            raise ValueError(f"{text}: is it spelled right?")
        text += ": the model will not see them"
        warnings.warn(text, stacklevel=3)


# %% book/chapters/19_vocabularies.md, cell 41
def chat_ids(
    self: Tokenizer, messages: Any,
    add_generation_prompt: bool | None = None, tools: Any = None,
    template: str | None = None, documents: Any = None,
    continue_final_message: bool = False,
    chat_template: str | None = None, **variables: Any,
) -> list[int]:
    """Ids of a conversation, special tokens only from its template.

    The model answers next, unless `add_generation_prompt` is False,
    or goes on with the last message if `continue_final_message`.
    `template` (or `chat_template`) is a name or a template. Other
    `variables` go to it; ValueError for one that it does not read.
    """
    if continue_final_message and add_generation_prompt:
        raise ValueError("go on with a message, or begin an answer")
    wanted = chat_template if template is None else template
    name, source = pick_template(self.companions, wanted, tools)
    given = {"tools": tools, "documents": documents}
    asked = [k for k, v in given.items() if v and name != "tool_use"]
    given["add_generation_prompt"] = not (
        continue_final_message or add_generation_prompt is False)
    text, letters, unread = chat_text(
        self, source, messages, continue_final_message,
        [*asked, *variables], given | variables)
    refuse_unread(unread, name)
    return self.backend.encode_special(text, letters)


# %% book/chapters/19_vocabularies.md, cell 42
def register_chat() -> None:
    """Give every tokenizer the method `chat`, which is `chat_ids`."""
    Tokenizer.chat = chat_ids  # type: ignore[attr-defined]
