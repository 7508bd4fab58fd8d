# Generated from book/chapters/98_server_details.md by `make sync`; edit the chapter.
"""`annotated-moe chat`: a conversation in a terminal.
"""

import argparse
import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from annotated_moe.chat import chat_ids, named_templates
from annotated_moe.checkpoints import load
from annotated_moe.config import DTYPES
from annotated_moe.generate import Model
from annotated_moe.serving.engine import Engine
from annotated_moe.serving.requests import Handle, Request
from annotated_moe.tokenizer import needed


# %% book/chapters/98_server_details.md, cell 27
@dataclass
class Talk:
    """What was said so far, and how to go on."""

    model: Model
    engine: Engine
    options: dict[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)
    system: str = ""

    @property
    def chats(self) -> bool:
        files = self.model.require_tokenizer().companions
        return "default" in named_templates(files)

    def prompt(self) -> list[int]:
        """The ids that the model goes on from."""
        tokenizer = self.model.require_tokenizer()
        if self.chats:
            system = {"role": "system", "content": self.system}
            said = [system] * bool(self.system) + self.messages
            return chat_ids(tokenizer, said)
        text = "".join([m["content"] for m in self.messages])
        ids, _ = self.model.read_prompt(self.system + text)
        return ids

    def submit(self) -> Handle:
        """Have the model go on; ValueError if it cannot."""
        stop = list(self.model.config.eos_ids)
        if self.chats:
            stop += self.model.require_tokenizer().stop_ids
        return self.engine.submit(Request(
            self.prompt(), stop_ids=stop, truncate=True,
            **self.options))

    def say(self, text: str) -> None:
        """Add what a person said."""
        if not self.chats and self.messages:
            text = "\n" + text
        self.messages.append({"role": "user", "content": text})

    def undo(self) -> bool:
        """Forget the last message and its reply; False if none."""
        while self.messages:
            if self.messages.pop()["role"] == "user":
                return True
        return False


# %% book/chapters/98_server_details.md, cell 28
def printable(text: str) -> str:
    """Without characters that a terminal obeys."""
    return "".join([c if c.isprintable() or c in "\n\t" else "\ufffd"
                    for c in text])


def pieces(talk: Talk, handle: Handle) -> Iterator[str]:
    """The reply as it comes, as it reads behind the prompt."""
    text = talk.model.require_tokenizer().stream()
    if not talk.chats:
        for token in handle.prompt:
            text.push(token)
    for event in handle:
        if event.token is not None:
            yield text.push(event.token)
        if event.finish_reason == "error":
            raise ValueError(event.error)
    yield text.flush()


def reply(talk: Talk, show: Callable[[str], None]) -> bool:
    """Show a reply and remember it; False if it was stopped."""
    handle, said, whole = talk.submit(), [], True
    try:
        for piece in pieces(talk, handle):
            said.append(piece)
            show(printable(piece))
    except KeyboardInterrupt:
        handle.cancel()
        whole = False
    talk.messages.append(
        {"role": "assistant", "content": "".join(said)})
    return whole


# %% book/chapters/98_server_details.md, cell 29
COMMANDS = {
    "/help": "this list",
    "/clear": "forget what was said",
    "/system TEXT": "what the model is told before all",
    "/set NAME VALUE": "temperature, top_p, max_new_tokens; top_k "
                       "and seed, none to unset; without: show",
    "/retry": "another reply to the last message (the same one, if "
              "there is a seed or temperature 0)",
    "/undo": "forget the last message and its reply",
    "/save FILE": "write down what was said [chat.txt]",
    "/exit": "end; so does Ctrl-D",
}
SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float, "top_p": float, "top_k": int, "seed": int,
    "max_new_tokens": int,
}


def set_option(talk: Talk, words: list[str]) -> str:
    """Change a setting; ValueError for what makes no sense."""
    if not words:
        return ", ".join(f"{name} {'none' if value is None else value}"
                         for name, value in talk.options.items())
    if len(words) != 2 or words[0] not in SETTINGS:
        raise ValueError(f"/set takes a name of {', '.join(SETTINGS)} "
                         "and a value")
    name, value = words
    try:
        new = None if value == "none" else SETTINGS[name](value)
    except ValueError:
        raise ValueError(f"{name} cannot be {value!r}") from None
    changed = {**talk.options, name: new}
    talk.engine.submit(Request([1], **changed)).cancel()    # or no
    talk.options = changed
    return f"{name} is {'none' if new is None else new}"


# %% book/chapters/98_server_details.md, cell 30
def obey(talk: Talk, line: str) -> str | None:
    """What a command says; None if the model shall answer again.

    EOFError for the last one; ValueError or OSError for one that
    cannot be done.
    """
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit"):
        raise EOFError
    if name == "/clear":
        talk.messages.clear()
        return "Forgotten."
    if name == "/system":
        talk.system = rest
        return "Noted." if rest else "There is no system text now."
    if name == "/set":
        return set_option(talk, rest.split())
    if name == "/undo":
        return "Forgotten." if talk.undo() else "Nothing was said."
    if name == "/save":
        text = "\n\n".join([f"{m['role']}: {m['content']}"
                            for m in talk.messages])
        Path(rest or "chat.txt").write_text(text + "\n", "utf-8")
        return f"Written to {rest or 'chat.txt'}."
    if name == "/retry":
        if not talk.messages:
            return "Nothing was said."
        if talk.messages[-1]["role"] == "assistant":
            talk.messages.pop()
        return None
    wide = max(map(len, COMMANDS))
    said = [f"{k:{wide}}  {v}" for k, v in COMMANDS.items()]
    wrong = [] if name == "/help" else [f"There is no {name}."]
    return "\n".join([*wrong, *said])


# %% book/chapters/98_server_details.md, cell 31
def read_turn(ask: Callable[[str], str]) -> str:
    """A message of a line or of several; EOFError at the end."""
    line = ask("> ")
    if line.strip() == '"""':
        lines = []
        while (line := ask(". ")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(ask(". "))
    return "\n".join(lines)


# %% book/chapters/98_server_details.md, cell 32
def converse(
    talk: Talk, ask: Callable[[str], str],
    show: Callable[[str], None], note: Callable[[str], None],
) -> None:
    """Message and reply, until there are no more messages."""
    while True:
        try:
            text = read_turn(ask)
            if not text.strip():
                continue
            if text.startswith("/"):
                said = obey(talk, text)
                if said is not None:
                    note(said)
                    continue
            else:
                talk.say(text)
            whole = reply(talk, show)
            show("\n")
            if not whole:
                note("Stopped. /retry asks for another.")
        except EOFError:
            return
        except KeyboardInterrupt:
            note("\n/exit or Ctrl-D ends the program.")
        except (ValueError, OSError, TypeError) as error:
            if talk.messages and talk.messages[-1]["role"] == "user":
                talk.messages.pop()
            note(str(error))


# %% book/chapters/98_server_details.md, cell 33
@contextlib.contextmanager
def history() -> Iterator[None]:
    """Arrow keys bring back what was typed, today and before."""
    try:
        import readline
    except ImportError:                     # not everywhere
        yield
        return
    path = Path.home() / ".annotated_moe_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)


def in_terminal(talk: Talk) -> None:
    """With colours, and a keyboard to edit lines with."""
    console = needed("rich.console", "annotated-moe chat", "serve")
    out = console.Console(highlight=False)

    def show(text: str) -> None:
        out.print(text, end="", markup=False, style="cyan",
                  soft_wrap=True)

    def note(text: str) -> None:
        out.print(text, markup=False, style="dim")

    kind = ("It chats." if talk.chats else
            "It cannot chat: it goes on from what you type.")
    note(f"{kind} /help says more; Ctrl-C stops a reply, Ctrl-D ends.")
    with history():
        converse(talk, input, show, note)
    out.print()


# %% book/chapters/98_server_details.md, cell 34
def from_pipe(talk: Talk) -> None:
    """Lines of standard input are messages; replies come out."""
    def ask(_: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def show(text: str) -> None:
        print(text, end="", flush=True)

    converse(talk, ask, show, lambda text: print(text, file=sys.stderr))


def run_chat(args: argparse.Namespace) -> None:
    model = load(args.model, dtype=args.dtype)
    model.require_tokenizer()
    engine, stop = Engine(model, slots=1), threading.Event()
    options = {name: getattr(args, name) for name in SETTINGS}
    engine.submit(Request([1], **options)).cancel()     # ValueError
    talk = Talk(model, engine, options, [], args.system)
    thread = threading.Thread(
        target=engine.run, args=[stop], daemon=True)
    thread.start()
    try:
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        (in_terminal if terminal else from_pipe)(talk)
    finally:
        stop.set()
        thread.join()


# %% book/chapters/98_server_details.md, cell 35
def add_chat(commands: Any) -> None:
    text = "talk to a model in the terminal"
    sub = commands.add_parser("chat", help=text, description=text)
    sub.set_defaults(run=run_chat)
    add = sub.add_argument
    add("--model",
        help="checkpoint folder, any layout [the small model]")
    add("--system", default="", help="what it is told before all")
    add("--max-new-tokens", type=int, default=200,
        help="of a reply, at most [200]")
    add("--temperature", type=float, default=0.8,
        help="0 takes the likeliest token each time [0.8]")
    add("--top-p", type=float, default=0.95,
        help="nucleus: the share of probability to keep [0.95]")
    add("--top-k", type=int, help="keep the k likeliest tokens [all]")
    add("--seed", type=int, help="same seed, same reply [any]")
    add("--dtype", choices=list(DTYPES),
        help="what to compute in [what is fast here]")
