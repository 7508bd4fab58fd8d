"""The server, asked over real sockets: what is said, what is refused, who waits."""

import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import string
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import pytest

import annotated_moe as am
from annotated_moe.checkpoints import small_model
from annotated_moe.families.grok import grok_config
from annotated_moe.model import init_params
from annotated_moe.serving import Engine
from annotated_moe.tokenizer import Tokenizer

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
constraints = pytest.importorskip("annotated_moe.serving.constraints")
guard = pytest.importorskip("annotated_moe.serving.guard")
http_module = pytest.importorskip("annotated_moe.serving.http")
protocol = pytest.importorskip("annotated_moe.serving.protocol")

JSON = {"content-type": "application/json"}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = {"prompt": "In the beginning", "max_tokens": 12, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "seed": 3}
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Grace"]}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model():
    """Random weights, the small model's tokenizer, and a chat template."""
    tokenizer = Tokenizer((small_model() / "tokenizer.model").read_bytes())
    tokenizer.companions["chat_template.jinja"] = TEMPLATE.encode()
    config = grok_config(
        vocab_size=tokenizer.vocab_size,
        context=128,
        d_model=32,
        d_ff=48,
        num_layers=2,
        q_heads=2,
        kv_heads=1,
        head_size=16,
        eos_ids=(2,),
        dtype="float32",
    )
    return am.Model(config, init_params(jax.random.key(0), config), tokenizer)


@contextlib.contextmanager
def serving(model, key="", hosts=(), service=None, **options):
    """A server on a port of its own, and its service."""
    service = guard.Service(Engine(model, **options), "tiny", **(service or {}))
    app = guard.guarded_app(service, key, hosts)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield SimpleNamespace(port=port, service=service, engine=service.engine)
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def live(model):
    with serving(model, slots=4, max_waiting=200) as server:
        yield server


def call(port, method, path, body=None, headers=JSON):
    wire = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = json.dumps(body) if isinstance(body, dict | list) else body
    with contextlib.closing(wire):
        wire.request(method, path, body, headers)
        reply = wire.getresponse()
        return reply.status, reply.read(), reply.headers


def post(port, path, body):
    status, data, _ = call(port, "POST", path, body)
    return status, json.loads(data)


def stream(port, path, body):
    """The chunks of a streamed answer, which must end as OpenAI's do."""
    _, data, headers = call(port, "POST", path, {**body, "stream": True})
    assert headers["content-type"] == "text/event-stream", data
    lines = data.decode().removesuffix("\n\n").split("\n\n")
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize(
    "options", [{}, {"logprobs": 3, "experts": True}, {"stop": ""}]
)
def test_a_streamed_completion_adds_up_to_the_whole(live, options):
    if "stop" in options:  # a text that will come
        _, free = post(live.port, "/v1/completions", TEXT)
        options = {"stop": free["choices"][0]["text"][5:8]}
    body = {**TEXT, **options}
    status, whole = post(live.port, "/v1/completions", body)
    chunks = stream(live.port, "/v1/completions", body)
    assert status == 200
    (choice,) = whole["choices"]
    pieces = [chunk["choices"][0] for chunk in chunks]
    assert "".join(piece["text"] for piece in pieces) == choice["text"] != ""
    assert pieces[-1]["finish_reason"] == choice["finish_reason"]
    assert {piece["finish_reason"] for piece in pieces[:-1]} <= {None}
    if "experts" in options:
        for name in ("tokens", "experts"):
            assert sum([p[name] for p in pieces], []) == choice[name]
        for name in ("tokens", "text_offset", "top_logprobs"):
            parts = [p["logprobs"][name] for p in pieces if p["logprobs"]]
            assert sum(parts, []) == choice["logprobs"][name]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert all(len(top) == 3 for top in choice["logprobs"]["top_logprobs"])
    if "stop" in options:
        assert options["stop"] not in choice["text"] and len(choice["text"]) <= 5
        assert choice["finish_reason"] == "stop"


def test_a_completion_is_what_the_model_says_by_itself(live, model):
    ids = model.tokenizer.encode(TEXT["prompt"])
    (new,) = model.generate_ids([ids], 12)
    _, whole = post(live.port, "/v1/completions", TEXT)
    said = TEXT["prompt"] + whole["choices"][0]["text"]
    assert said == model.tokenizer.decode([*ids, *new])
    spaced = model.tokenizer.encode("of the")[-1]  # " the"
    body = {**TEXT, "max_tokens": 1, "logit_bias": {str(spaced): 100}}
    assert post(live.port, "/v1/completions", body)[1]["choices"][0]["text"] == " the"
    _, by_ids = post(live.port, "/v1/completions", {**TEXT, "prompt": ids})
    assert by_ids["choices"] == whole["choices"]
    assert whole["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 12,
        "total_tokens": len(ids) + 12,
    }


def test_seeds_biases_and_settings_reach_the_engine(live):
    def text(**options):
        return post(
            live.port, "/v1/completions", {**TEXT, "temperature": 1.5, **options}
        )[1]["choices"][0]["text"]

    assert text(seed=-5) == text(seed=-5) != text(seed=6)
    assert text(seed=2**40) != text(seed=0)
    biased = text(logit_bias={"300": 100}, seed=1, logprobs=0)
    assert len(set(biased.split())) <= 2
    assert text(top_k=1, seed=1) == text(top_k=1, seed=2) == text(temperature=0)


def test_the_official_client(live):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{live.port}/v1", api_key="any", max_retries=0
    )
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    done = client.completions.create(model="tiny", **TEXT)
    assert done.choices[0].finish_reason == "length"
    whole = client.chat.completions.create(
        model="tiny", **CHAT, logprobs=True, top_logprobs=2
    )
    chunks = list(
        client.chat.completions.create(
            model="tiny", **CHAT, stream=True, stream_options={"include_usage": True}
        )
    )
    said = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(said) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens == 12
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    rule = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
    told = client.chat.completions.create(
        model="tiny", **{**CHAT, "max_tokens": 60}, response_format=rule
    )
    assert json.loads(told.choices[0].message.content)["name"] in ("Ada", "Grace")
    with pytest.raises(openai.NotFoundError, match="no 'gpt-5' here"):
        client.chat.completions.create(model="gpt-5", **CHAT)
    with pytest.raises(openai.BadRequestError, match="n: this server can only do 1"):
        client.chat.completions.create(model="tiny", **CHAT, n=2)


SCHEMAS = [
    PERSON,
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"anyOf": [{"type": "null"}, {"const": 'é\n"中'}]},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(4))
def test_structured_output_is_valid(live, schema):
    jsonschema = pytest.importorskip("jsonschema")
    rule = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(3):
        body = {**TEXT, "max_tokens": 80, "temperature": 1.2, "seed": seed}
        _, reply = post(live.port, "/v1/completions", {**body, "response_format": rule})
        (choice,) = reply["choices"]
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["text"]), schema)


def test_a_regular_expression_and_its_first_space(live):
    for pattern in ("yes|no", " yes| no"):
        rule = {"type": "regex", "regex": pattern}
        _, reply = post(live.port, "/v1/completions", {**TEXT, "response_format": rule})
        assert re.fullmatch(pattern, reply["choices"][0]["text"])


def test_the_bytes_of_pieces_add_up_to_the_text(model):
    pieces = constraints.token_bytes(model.tokenizer)
    text = "  In the\tbeginning,\n def f(x): # é中\U0001f600 "
    ids = model.tokenizer.encode(text)
    found = b"".join(pieces[i] for i in ids).decode()
    assert found.lstrip() == model.tokenizer.decode(ids).lstrip() == text.lstrip()


BAD = {
    "model": ["gpt-5", 3, []],
    "temperature": ["hot", -1, 2.1, 1e9, True, [], {}],
    "top_p": [0, 1.5, "1", False, [0.5]],
    "top_k": [0, 1.5, "many", 2**40],
    "max_tokens": [0, -1, 1.5, "many", 10**6, True, 10**30],
    "seed": [1.5, "x", 2**70, True],
    "stop": ["", [""], ["a"] * 5, 7, ["a", 7], "x" * 300, {"a": 1}],
    "stream": ["yes", 1, []],
    "stream_options": [True, {"include": 1}, {"include_usage": True}],
    "n": [0, 2, "1", True],
    "logit_bias": [
        [],
        {"x": 1},
        {"99999": 1},
        {"5": 101},
        {"5": "1"},
        {"²": 1},
        {"-1": 1},
    ],
    "presence_penalty": [1, "0", -2],
    "frequency_penalty": [0.5, []],
    "experts": ["all", 1],
    "truncate": ["yes", 0],
    "response_format": [
        "json",
        {},
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "regex"},
        {"type": "regex", "regex": "(a"},
        {"type": "regex", "regex": 7},
        {"type": "json_schema", "json_schema": {"schema": {"type": 7}}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}},
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://x/y"}}},
        {"type": "json_schema", "json_schema": {"schema": {"not": {}}}},
        {"type": "json_schema", "json_schema": {"schema": [1]}},
    ],
}
BAD_TEXT = {
    "prompt": [
        "",
        [],
        7,
        {},
        [1.5],
        [[1], [2]],
        ["a", "b"],
        [-1],
        [10**6],
        [True],
        [[]],
        "half \ud800 of a pair",
        "long " * 300,
    ],
    "logprobs": [-1, 9, True, "2"],
    "echo": [True, 1],
    "best_of": [2],
    "suffix": ["x"],
}
BAD_CHAT = {
    "messages": [
        [],
        "hi",
        {},
        [7],
        [{}],
        [{"role": "user"}],
        [{"role": "wizard", "content": "x"}],
        [{"role": "user", "content": 7}],
        [{"role": ["user"], "content": "x"}],
        [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "x"}}],
            }
        ],
        [{"role": "user", "content": [7]}],
    ],
    "logprobs": [1, "yes"],
    "top_logprobs": [1],
    "tools": [[{"type": "function"}], "x"],
    "tool_choice": ["required", {}],
    "max_completion_tokens": [0, "x"],
}
BROKEN = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"7",
    b'"x"',
    b"\xff\xfe",
    b"[" * 50_000,
    b'{"prompt": NaN}',
    b'{"prompt": 1e999}',
    b'{"prompt": ' + b"1" * 6000 + b"}",
    b"{'prompt': 1}",
    b"\x00",
    b'{"a":' * 5000,
    "ü".encode("utf-16"),
    b'{"prompt": Infinity}',
]


def malformed(rng):
    """(method, path, body, headers, the field that must be named or None)."""
    chat = rng.random() < 0.25
    path = "/v1/chat/completions" if chat else "/v1/completions"
    kind = rng.randrange(8)
    if kind == 0:
        return "POST", path, rng.choice(BROKEN), JSON, None
    if kind == 1:
        junk = rng.randbytes(rng.randrange(200))
        return "POST", path, junk, JSON, None
    if kind == 2:
        name = "".join(rng.choices(string.printable, k=rng.randrange(1, 12)))
        return (
            "POST",
            path,
            {**(CHAT if chat else TEXT), "x" + name: 1},
            JSON,
            "x" + name,
        )
    if kind == 3:
        odd = [
            ("GET", path),
            ("PUT", path),
            ("POST", "/v1/none"),
            ("GET", "/v1/models/x"),
            ("DELETE", "/health"),
            ("GET", "/%00"),
            ("POST", "/"),
        ]
        return *rng.choice(odd), b"{}", JSON, None
    if kind == 4:
        wrong = rng.choice(["text/plain", "", "application/x-www-form-urlencoded"])
        return "POST", path, b"{}", {"content-type": wrong}, None
    table = BAD | (BAD_CHAT if chat else BAD_TEXT)
    name = rng.choice(sorted(table))
    body = {**(CHAT if chat else TEXT), name: rng.choice(table[name])}
    return "POST", path, body, JSON, name


def refused(port, request):
    """Ask what is malformed; it must be refused in one good sentence."""
    method, path, body, headers, name = request
    status, data, _ = call(port, method, path, body, headers)
    assert 400 <= status < 500, (request, data)
    error = json.loads(data)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"], error
    assert len(error["message"]) < 400 and "Traceback" not in error["message"]
    if name is not None:
        assert error["param"] in (name, "model"), (request, error)


def test_three_hundred_malformed_requests(live):
    rng = random.Random(0)
    before = live.engine.stats.new_tokens
    for _ in range(300):
        refused(live.port, malformed(rng))
    assert live.engine.stats.new_tokens == before and not live.engine.busy
    assert post(live.port, "/v1/completions", TEXT)[0] == 200


def test_every_bad_value_is_refused(live):
    """Without the random choice, and without the templates' processes."""
    for table, body, path in ((BAD | BAD_TEXT, TEXT, "/v1/completions"),):
        for name, values in table.items():
            for value in values:
                refused(live.port, ("POST", path, {**body, name: value}, JSON, name))


def until(condition):
    end = time.time() + 60
    while not condition():
        assert time.time() < end
        time.sleep(0.002)


def connection(port, body):
    """A connection on which the body was posted to /v1/completions."""
    data = json.dumps(body).encode()
    wire = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    wire.sendall(head.encode() + data)
    return wire


@pytest.mark.parametrize("streamed", [True, False])
def test_whoever_hangs_up_frees_the_row(live, streamed):
    body = {**TEXT, "max_tokens": 110, "stream": streamed, "logit_bias": {"2": -100}}
    engine, ended = live.engine, live.engine.stats.ended.get("cancelled", 0)
    before, step = engine.stats.new_tokens, engine.step
    engine.step = lambda: (time.sleep(0.01), step())  # not done before it is noticed
    try:
        wire = connection(live.port, body)
        until(lambda: engine.stats.new_tokens > before)
        wire.close()
        until(lambda: engine.stats.ended.get("cancelled", 0) == ended + 1)
    finally:
        del engine.step
    until(lambda: engine.stats.running == 0)
    assert engine.stats.new_tokens - before < 110


def test_a_full_line_says_when_to_come_back(model):
    with serving(model, slots=1, max_waiting=2) as server:
        slow = {**TEXT, "max_tokens": 110, "logit_bias": {"2": -100}}
        wires = [connection(server.port, slow)]
        until(lambda: server.engine.stats.running == 1)
        wires += [connection(server.port, slow) for _ in range(2)]
        until(lambda: server.engine.stats.waiting == 2)
        status, data, headers = call(server.port, "POST", "/v1/completions", TEXT)
        error = json.loads(data)["error"]
        assert (status, error["code"]) == (429, "queue_full")
        assert 1 <= int(headers["retry-after"]) <= 60
        for wire in wires:  # nobody in the line is lost
            with wire.makefile("rb") as lines:
                assert b" 200 " in lines.readline()
            wire.close()
        until(lambda: not server.engine.busy)
        assert post(server.port, "/v1/completions", TEXT)[0] == 200
        _, text, _ = call(server.port, "GET", "/metrics")
        text = text.decode()
        assert "\nannotated_moe_refused_total 1\n" in text
        assert '{path="/v1/completions",status="429"} 1\n' in text
        for line in text.splitlines():
            number = line.startswith("#") or float(line.split(" ")[-1]) >= 0
            assert number and len(line.split(" ")) >= 2


def test_limits_of_time_and_size(model):
    limits = {"seconds": 0.05, "max_bytes": 1000, "max_tokens": 50}
    with serving(model, slots=1, service=limits) as server:
        status, reply = post(
            server.port, "/v1/completions", {**TEXT, "prompt": "x" * 2000}
        )
        assert status == 413 and "1,000 bytes" in reply["error"]["message"]
        status, reply = post(server.port, "/v1/completions", {**TEXT, "max_tokens": 51})
        assert status == 400 and "50 at most" in reply["error"]["message"]
        server.engine.step = lambda: time.sleep(0.01)  # never gets there
        status, reply = post(server.port, "/v1/completions", TEXT)
        assert status == 504 and "longer than" in reply["error"]["message"]
        del server.engine.step


@pytest.mark.parametrize("tokens", [12, 5])
def test_a_slow_reader_gets_what_was_written_in_time(model, tokens):
    """Read one line, then the rest when the time is over: 12 are all, 5 are not."""
    service = http_module.Service(Engine(model, slots=1), "tiny")
    options = {**TEXT, "logit_bias": {"2": -100}}
    wish = protocol.Wish("completions", model, "tiny", 128, 128)
    wish = protocol.read_body(options, wish)

    def step_until(ticket, count):  # the engine's thread, by hand
        while len(ticket.handle.events) < count:
            service.engine.step()

    async def slow():
        ticket = http_module.Ticket(service, wish.request)
        lines = http_module.lines_of(service, wish, ticket)
        step_until(ticket, 1)
        read = [await anext(lines)]
        step_until(ticket, tokens)
        await asyncio.sleep(0)  # let the events in before the end
        ticket.expire()
        while service.engine.busy:
            service.engine.step()
        return ticket, read + [line async for line in lines]

    ticket, lines = asyncio.run(slow())
    *pieces, last = [line.removeprefix(b"data: ").decode() for line in lines]
    if tokens == 5:
        assert json.loads(last)["error"]["message"].startswith("it took longer")
    else:
        assert last == "[DONE]\n\n"
    choices = [json.loads(piece)["choices"][0] for piece in pieces]
    said = "".join(choice["text"] for choice in choices)
    written = [event.text for event in ticket.handle.events[:tokens]]
    assert said.lstrip() == "".join(written).lstrip() != ""
    assert choices[-1]["finish_reason"] == ("length" if tokens == 12 else None)


def test_how_many_tokens_goes_by_two_names(live):
    path = "/v1/chat/completions"
    chat = {name: value for name, value in CHAT.items() if name != "max_tokens"}

    def said(body, path=path):
        status, reply = post(live.port, path, body)
        assert status == 400
        return reply["error"]["param"], reply["error"]["message"]

    name = "max_completion_tokens"
    field, message = said({**chat, name: 10**6})
    assert field == name and message.startswith(f"{name}: this server gives 128 at")
    field, message = said({**chat, name: 5, "max_tokens": 5})
    assert (field, message) == (name, f"{name}: give this or max_tokens, not both")
    field, message = said({**TEXT, "max_tokens": 0}, "/v1/completions")
    assert "a whole number from 1 to 2,147,483,648, not 0" in message
    status, reply = post(live.port, path, {**chat, name: 3, "max_tokens": None})
    assert status == 200 and reply["usage"]["completion_tokens"] <= 3


def test_a_wrong_address_says_which_there_are(live):
    for path in ("/completions", "/v1"):
        status, reply = post(live.port, path, TEXT)
        assert status == 404
        assert "POST /v1/completions," in reply["error"]["message"]
    status, data, _ = call(live.port, "GET", "/v1/completions")
    assert status == 405 and b"POST /v1/completions," in data


def test_the_key_and_the_names(model):
    with serving(model, key="s3cret", hosts=["127.0.0.1"]) as server:

        def status(path, **headers):
            return call(server.port, "GET", path, None, headers)[0]

        assert status("/v1/models") == status("/metrics") == 401
        assert status("/v1/models", Authorization="Bearer wrong") == 401
        assert status("/v1/models", Authorization="Basic s3cret") == 401
        assert status("/v1/models", Authorization="Bearer \xe9") == 401
        assert status("/v1/models", Authorization="Bearer s3cret") == 200
        assert status("/health") == status("/") == 200
        assert status("/health", Host="evil.example") == 403
        assert status("/health", Host=f"127.0.0.1:{server.port}") == 200


def test_the_page_runs_only_its_own_script(live):
    status, page, headers = call(live.port, "GET", "/")
    text, policy = page.decode(), headers["content-security-policy"]
    assert status == 200 and "default-src 'none'" in policy
    assert "unsafe" not in policy and guard.hash_of("script", text) in policy
    assert "://" not in text and "innerHTML" not in text
    assert not re.search(r"\son\w+=|style=", text)  # the policy forbids these


def run_command(*words, **options):
    main = "import sys; from annotated_moe.cli import main; sys.exit(main())"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", main, *words],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_a_terminated_server_finishes_what_runs():
    server = run_command("serve", "--port", "0", "--slots", "1")
    try:
        for line in server.stderr:
            if found := re.search(r"127\.0\.0\.1:(\d+)", line):
                break
        port = int(found[1])
        body = {**TEXT, "max_tokens": 150, "stream": True, "logit_bias": {"2": -100}}
        with connection(port, body) as wire, wire.makefile("rb") as lines:
            while not lines.readline().startswith(b"data: {"):
                pass
            with connection(port, body | {"max_tokens": 3}) as other:
                time.sleep(0.1)  # it waits for the only row
                server.send_signal(signal.SIGTERM)
                rest = lines.read().decode()
                assert other.makefile("rb").read().count(b"data: ") == 4
        assert rest.count("data: ") >= 100 and "[DONE]" in rest
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        assert server.wait(30) == 0
    finally:
        server.kill()


def test_an_address_that_is_taken(capsys):
    from annotated_moe import cli

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err
    assert cli.main(["serve", "--slots", "0"]) == 2
    assert "--slots" in capsys.readouterr().err


def test_chat_without_a_terminal():
    chat = run_command(
        "chat",
        "--temperature",
        "0",
        "--max-new-tokens",
        "5",
        "--dtype",
        "float32",
        stdin=subprocess.PIPE,
    )
    typed = 'In the beginning\n/set temperature 9x\n"""\nMore\nlines\n"""\n/what\n'
    out, err = chat.communicate(typed, timeout=100)
    assert chat.returncode == 0
    assert out.startswith(" of the LORD,") and out.count("\n") >= 2
    assert "temperature cannot be '9x'" in err and "There is no /what." in err


def test_a_stopped_reply_is_remembered_and_the_program_goes_on(model):
    """Ctrl-C, as the terminal delivers it: within `show`."""
    from annotated_moe import chat_command as chat

    engine, stop, said = Engine(model, slots=1), threading.Event(), []
    talk = chat.Talk(model, engine, {"max_new_tokens": 100, "seed": 0})
    thread = threading.Thread(target=engine.run, args=[stop])
    thread.start()

    def show(text):
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt

    typed = iter(["Hello", "/set top_p 7", "/undo", "/exit"])
    notes = []
    try:
        chat.converse(talk, lambda _: next(typed), show, notes.append)
        until(lambda: not engine.busy)
    finally:
        stop.set()
        thread.join()
    assert engine.stats.ended.get("cancelled") and len(said) < 10
    assert notes[0].startswith("Stopped") and "top_p" in notes[1]
    assert notes[2] == "Forgotten." and talk.messages == []
