# Generated from book/chapters/31_server.md, book/chapters/31b_grammar.md, book/chapters/98_server_details.md by `make sync`; edit the chapters.
"""OpenAI's requests and answers, as data: no sockets in here.
"""

import difflib
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from annotated_moe.chat import chat_ids, named_templates
from annotated_moe.generate import Model
from annotated_moe.serving.constraints import grammar_for, spelled
from annotated_moe.serving.requests import Event, Request
from annotated_moe.serving.rows import TOP

# %% book/chapters/31_server.md, cell 13
KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class Refusal(ValueError):
    """A no, in one sentence; `param` is the field that it is about."""

    def __init__(
        self, message: str, param: str | None = None,
        status: int = 400, code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        usual = ("server_error" if self.status >= 500
                 else "invalid_request_error")
        kind = KINDS.get(self.status, usual)
        return {"error": {"message": str(self), "type": kind,
                          "param": self.param, "code": self.code}}


# %% book/chapters/31_server.md, cell 14
@dataclass
class Wish:
    """What a body asks for, of "completions" or of "chat"."""

    kind: str
    model: Model
    name: str                               # what clients call it
    context: int
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    usage: bool = False                     # in a stream, too
    limit: str = "max_tokens"               # the field's name
    lead: str = ""                          # of the first word
    written: int = 0                        # characters so far
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def chat(self) -> bool:
        return self.kind == "chat"

    @property
    def request(self) -> Request:
        return Request(**self.options)


# %% book/chapters/31_server.md, cell 15
Reader = Callable[[Wish, str, Any], None]
FIELDS: dict[str, dict[str, Reader]] = {"completions": {}, "chat": {}}


def accepts(name: str, *kinds: str) -> Callable[[Reader], Reader]:
    """Register what reads a field, of these kinds or of both."""
    def register(read: Reader) -> Reader:
        for kind in kinds or FIELDS:
            FIELDS[kind][name] = read
        return read

    return register


# %% book/chapters/31_server.md, cell 16
def number(
    low: float | int, high: float | int, option: str,
    whole: bool = False,
) -> Reader:
    """What reads a number from low to high into an option."""
    def read(wish: Wish, name: str, value: Any) -> None:
        good = type(value) is int or type(value) is float and not whole
        if not good or not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            raise ValueError(
                f"must be {kind} from {low:,} to {high:,}, "
                f"not {value!r:.60}"
            )
        wish.options[option] = value if whole else float(value)

    return read


# %% book/chapters/31_server.md, cell 17
accepts("temperature")(number(0, 2, "temperature"))
accepts("top_p")(number(1e-6, 1, "top_p"))


# %% book/chapters/31_server.md, cell 18
def truth(wish: Wish, name: str, value: Any) -> bool:
    """`value`, if it is true or false."""
    if type(value) is not bool:
        raise ValueError(f"must be true or false, not {value!r:.60}")
    return value


# %% book/chapters/31_server.md, cell 19
@accepts("stream")
def read_stream(wish: Wish, name: str, value: Any) -> None:
    wish.stream = truth(wish, name, value)


@accepts("experts")
def read_experts(wish: Wish, name: str, value: Any) -> None:
    wish.options["experts"] = truth(wish, name, value)


# %% book/chapters/31_server.md, cell 20
@accepts("model")
def read_model(wish: Wish, name: str, value: Any) -> None:
    if value != wish.name:
        raise Refusal(
            f"model: there is no {value!r:.60} here, only "
            f"{wish.name!r}", name, 404, "model_not_found")


# %% book/chapters/31_server.md, cell 21
@accepts("prompt", "completions")
def read_prompt(wish: Wish, name: str, value: Any) -> None:
    """One text, or the ids of one; a list of one of them will do."""
    rows = isinstance(value, list) and len(value) == 1
    if rows and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str):
        value, _ = wish.model.read_prompt(value)
    size = wish.model.config.vocab_size
    if not isinstance(value, list) or any(
        type(i) is not int or not 0 <= i < size for i in value
    ):
        raise ValueError(
            f"must be one text, or one list of ids from 0 to {size - 1}"
        )
    if not value:
        raise ValueError("is empty: give it some text")
    wish.options["prompt"] = value


# %% book/chapters/31_server.md, cell 22
def unknown(name: str, kind: str) -> Refusal:
    """What is said of a field that there is not."""
    close = difflib.get_close_matches(name, FIELDS[kind], 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return Refusal(
        f"there is no field {name!r:.60}{hint}", name[:60])


# %% book/chapters/31_server.md, cell 23
def read_body(body: Any, wish: Wish) -> Wish:
    """The wish, complete; Refusal names the field that is wrong."""
    if not isinstance(body, dict):
        raise Refusal("the body must be a JSON object")
    fields = FIELDS[wish.kind]
    for name in body:
        if name not in fields:
            raise unknown(name, wish.kind)
    for name, read in fields.items():
        if body.get(name) is None:          # null is as good as absent
            continue
        try:
            read(wish, name, body[name])
        except Refusal:
            raise
        except (ValueError, TypeError) as error:
            raise Refusal(f"{name}: {error}", name) from None
    return complete(wish)


# %% book/chapters/31_server.md, cell 24
@accepts("max_completion_tokens", "chat")
@accepts("max_tokens")
def read_most(wish: Wish, name: str, value: Any) -> None:
    """How many tokens at most, by the old name or the new."""
    if "max_new_tokens" in wish.options:
        raise ValueError(f"give this or {wish.limit}, not both")
    number(1, 2**31, "max_new_tokens", whole=True)(wish, name, value)
    wish.limit = name


# %% book/chapters/31_server.md, cell 25
def complete(wish: Wish) -> Wish:
    """Set what was left open; Refusal for what does not fit."""
    options, name = wish.options, "messages" if wish.chat else "prompt"
    if "prompt" not in options:
        raise Refusal(f"{name}: the body needs this field", name)
    options.setdefault("temperature", 1.0)
    options.setdefault("seed", None)
    read = len(options["prompt"])
    left = min(wish.context - read + 1, wish.max_tokens)
    usual = left if wish.chat else min(left, 16)
    asked = options.setdefault("max_new_tokens", max(usual, 1))
    if asked > wish.max_tokens:
        raise Refusal(
            f"{wish.limit}: this server gives {wish.max_tokens} at "
            f"most, not {asked}", wish.limit)
    if asked > left and not options.get("truncate"):
        raise Refusal(
            f"{name}: {read} tokens to read and {asked} to write do "
            f"not fit into a context of {wish.context}", name,
            code="context_length_exceeded")
    return wish


# %% book/chapters/31_server.md, cell 29
def text_of(wish: Wish, events: list[Event]) -> str:
    """Their text, as it reads behind the prompt."""
    first = events[0] if events else None
    if first and first.index == 0 and first.token is not None:
        ids = [*wish.options["prompt"][-1:], first.token]
        decode = wish.model.require_tokenizer().decode
        added = decode(ids)[len(decode(ids[:-1])) :]
        wish.lead = " " if added[:1] == " " and not wish.chat else ""
    text = "".join([event.text for event in events])
    if text and not text.startswith(wish.lead):
        text = wish.lead + text
    wish.lead = "" if text else wish.lead
    return text


# %% book/chapters/31_server.md, cell 30
EXTRAS: list[Callable[[Wish, list[Event]], dict[str, Any]]] = []


def choice_of(
    wish: Wish, events: list[Event], chunk: bool
) -> dict[str, Any]:
    """Some events, as OpenAI's clients want them."""
    text = text_of(wish, events)
    reason = events[-1].finish_reason if events else None
    made: dict[str, Any] = {"index": 0, "finish_reason": reason}
    if not wish.chat:
        made["text"] = text
    elif chunk:
        made["delta"] = {"content": text} if text or not reason else {}
    else:
        made["message"] = {"role": "assistant", "content": text}
    for extra in EXTRAS:
        made |= extra(wish, events)
    return made


# %% book/chapters/31_server.md, cell 31
def show_experts(wish: Wish, events: list[Event]) -> dict[str, Any]:
    """Ids, and the experts of each layer in the step that made them."""
    if not wish.options.get("experts"):
        return {}
    made = [e for e in events if e.token is not None]
    return {
        "tokens": [e.token for e in made],
        "experts": [None if e.experts is None else e.experts.tolist()
                    for e in made],
    }


EXTRAS.append(show_experts)


# %% book/chapters/31_server.md, cell 32
def answer_of(
    wish: Wish, choices: list[dict[str, Any]], chunk: bool
) -> dict[str, Any]:
    """What stands around a choice."""
    kind = "chat.completion" if wish.chat else "text_completion"
    prefix = "chatcmpl-" if wish.chat else "cmpl-"
    return {
        "id": prefix + wish.id,
        "object": kind + ".chunk" * (chunk and wish.chat),
        "created": wish.created, "model": wish.name,
        "choices": choices,
    }


# %% book/chapters/31_server.md, cell 33
def usage_of(wish: Wish, count: int) -> dict[str, int]:
    """How many tokens were read, and written."""
    read = len(wish.options["prompt"])
    return {"prompt_tokens": read, "completion_tokens": count,
            "total_tokens": read + count}


# %% book/chapters/31_server.md, cell 34
def dump(data: Any) -> bytes:
    """JSON in UTF-8; half a surrogate pair becomes a ?."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace")


# %% book/chapters/31b_grammar.md, cell 16
@accepts("response_format")
def read_format(wish: Wish, name: str, value: Any) -> None:
    """OpenAI's three, and {"type": "regex", "regex": "..."}."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return
    if kind == "json_object":
        rule: Any = {"type": "object"}
    elif kind == "json_schema":
        rule = value.get("json_schema")
        rule = rule.get("schema") if isinstance(rule, dict) else None
    elif kind == "regex":
        rule = value.get("regex")
    else:
        raise ValueError(
            "needs a type: text, json_object, json_schema or regex")
    if not isinstance(rule, str if kind == "regex" else (dict, bool)):
        raise ValueError(f"{kind} needs its rule: {str(value):.80}")
    wish.options["constraint"] = grammar_for(wish.model, kind, rule)


# %% book/chapters/98_server_details.md, cell 7
def ignore(wish: Wish, name: str, value: Any) -> None:
    """For whom it is, or what it costs."""


def only(*values: Any) -> Reader:
    """What takes these values, which ask for nothing."""
    def read(wish: Wish, name: str, value: Any) -> None:
        kinds = (bool,) if type(value) is bool else (
            int, float, str, list)
        if not any(type(v) in kinds and v == value for v in values):
            raise ValueError(
                f"this server can only do {values[0]!r}, "
                f"not {value!r:.60}; leave it out")

    return read


PLAIN: dict[str, Reader] = {
    "user": ignore, "metadata": ignore, "service_tier": ignore,
    "safety_identifier": ignore, "prompt_cache_key": ignore,
    "parallel_tool_calls": ignore, "n": only(1), "best_of": only(1),
    "presence_penalty": only(0), "frequency_penalty": only(0),
    "echo": only(False), "store": only(False), "suffix": only(""),
    "tools": only([]), "functions": only([]),
    "tool_choice": only("none", "auto"), "modalities": only(["text"]),
}
for table in FIELDS.values():
    table |= PLAIN


# %% book/chapters/98_server_details.md, cell 8
accepts("top_k")(number(1, 2**31 - 1, "top_k", whole=True))


@accepts("seed")
def read_seed(wish: Wish, name: str, value: Any) -> None:
    """64 bits, as OpenAI's; ours has 32, so they are folded."""
    number(-(2**63), 2**63 - 1, "seed", whole=True)(wish, name, value)
    wish.options["seed"] = (value ^ value >> 32) % 2**32


@accepts("truncate")
def read_truncate(wish: Wish, name: str, value: Any) -> None:
    wish.options["truncate"] = truth(wish, name, value)


@accepts("stop")
def read_stop(wish: Wish, name: str, value: Any) -> None:
    """A text or up to four; long ones would cost every step."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > 4 or any(
        not isinstance(text, str) or not 0 < len(text) <= 256
        for text in texts
    ):
        raise ValueError(
            "must be one text or up to four, of 1 to 256 characters")
    wish.options["stop"] = texts


@accepts("stream_options")
def read_stream_options(wish: Wish, name: str, value: Any) -> None:
    if not isinstance(value, dict) or set(value) - {
        "include_usage", "include_obfuscation"
    }:
        raise ValueError("takes include_usage, true or false")
    if not wish.stream:
        raise ValueError("needs stream to be true")
    if value.get("include_usage") is not None:
        wish.usage = truth(wish, name, value["include_usage"])


# %% book/chapters/98_server_details.md, cell 9
@accepts("logit_bias")
def read_bias(wish: Wish, name: str, value: Any) -> None:
    """{"1234": -100}: ids are texts, because JSON has no others."""
    size, found = wish.model.config.vocab_size, dict[int, float]()
    if not isinstance(value, dict) or len(value) > 1024:
        raise ValueError(
            "must be an object with a number for each id, of 1,024 "
            "at most")
    for key, bias in value.items():
        known = key.isdecimal() and len(key) < 10 and int(key) < size
        good = type(bias) in (int, float) and -100 <= bias <= 100
        if not known or not good:
            raise ValueError(
                f"{key[:20]!r}: {bias!r:.20} is no id below {size} "
                "with a number from -100 to 100")
        found[int(key)] = float(bias)
    wish.options["logit_bias"] = found


accepts("logprobs", "completions")(
    number(0, TOP, "logprobs", whole=True))


@accepts("logprobs", "chat")
def read_logprobs(wish: Wish, name: str, value: Any) -> None:
    if truth(wish, name, value):
        wish.options["logprobs"] = 0


@accepts("top_logprobs", "chat")
def read_top_logprobs(wish: Wish, name: str, value: Any) -> None:
    if "logprobs" not in wish.options:
        raise ValueError("needs logprobs to be true")
    number(0, TOP, "logprobs", whole=True)(wish, name, value)


# %% book/chapters/98_server_details.md, cell 10
@accepts("messages", "chat")
def read_messages(wish: Wish, name: str, value: Any) -> None:
    """A conversation, by the template that came with the model."""
    tokenizer = wish.model.require_tokenizer()
    if "default" not in named_templates(tokenizer.companions):
        raise ValueError(
            f"{wish.name!r} has no chat template, so it cannot chat; "
            "send a prompt to /v1/completions"
        )
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of messages, not empty")
    said = [read_message(i, message) for i, message in enumerate(value)]
    ids = chat_ids(tokenizer, said)
    wish.options["prompt"] = tokenizer.check_ids(
        ids, wish.model.config.vocab_size)
    stop = (*wish.model.config.eos_ids, *tokenizer.stop_ids)
    wish.options["stop_ids"] = stop


# %% book/chapters/98_server_details.md, cell 11
ROLES = {"system": "system", "developer": "system", "user": "user",
         "assistant": "assistant"}


def read_message(i: int, message: Any) -> dict[str, str]:
    """A role and a text; ValueError for what is none."""
    where = f"number {i}"
    if not isinstance(message, dict):
        raise ValueError(f"{where} must have a role and a content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(
            f"{where} has the role {role!r:.40}; "
            f"there are {', '.join(ROLES)}"
        )
    if isinstance(content, list):
        content = "".join([read_part(where, part) for part in content])
    if not isinstance(content, str):
        raise ValueError(f"{where} needs a content that is text")
    return {"role": ROLES[role], "content": content}


def read_part(where: str, part: Any) -> str:
    """The text of a part of a message."""
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str) or part.get("type") != "text":
        raise ValueError(f"{where} has a part that is no text")
    return text


# %% book/chapters/98_server_details.md, cell 13
def named(wish: Wish, token: int) -> tuple[str, bytes]:
    """A token as a text, and its bytes."""
    tokenizer = wish.model.require_tokenizer()
    if token >= tokenizer.vocab_size:
        return f"<{token}>", b""
    data = spelled(tokenizer, token)
    text = data.decode("utf-8", "replace")
    return text or tokenizer.decode([token], specials=True), data


def finite(value: float | None) -> float:
    return max(float(value or 0.0), -9999.0)


def rated(
    wish: Wish, token: int, value: float | None
) -> dict[str, Any]:
    text, data = named(wish, token)
    return {"token": text, "logprob": finite(value),
            "bytes": list(data)}


# %% book/chapters/98_server_details.md, cell 14
def show_logprobs(wish: Wish, events: list[Event]) -> dict[str, Any]:
    """OpenAI's `logprobs` of a choice, null where nobody asked."""
    made = [e for e in events if e.token is not None]
    if wish.options.get("logprobs") is None or not made:
        return {"logprobs": None}
    if wish.chat:
        return {"logprobs": {"content": [
            rated(wish, e.token, e.logprob) | {"top_logprobs": [
                rated(wish, i, p) for i, p in e.top_logprobs]}
            for e in made if e.token is not None
        ]}}
    texts = [named(wish, e.token or 0)[0] for e in made]
    offsets = []
    for text in texts:
        offsets.append(wish.written)
        wish.written += len(text)
    return {"logprobs": {
        "tokens": texts, "text_offset": offsets,
        "token_logprobs": [finite(e.logprob) for e in made],
        "top_logprobs": [
            {named(wish, i)[0]: finite(p) for i, p in e.top_logprobs}
            for e in made],
    }}


EXTRAS.append(show_logprobs)
