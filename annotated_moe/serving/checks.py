# Generated from book/chapters/97_serving_details.md by `make sync`; edit the chapter.
"""What reaches an engine comes from strangers, and what is wrong with
one request must not be found out inside a step that others share. This
appendix says no in one sentence, before a request gets in line. It
registers with `announce`, as the checks of the model's own requests do,
and asks them first.
"""

from typing import Any

import numpy as np

from annotated_moe.cache import Paged, cache_kind
from annotated_moe.generate import announce
from annotated_moe.lens import expert_layers
from annotated_moe.serving.requests import Request
from annotated_moe.serving.rows import TOP


# %% book/chapters/97_serving_details.md, cell 4
def check_count(name: str, value: Any, least: int, most: int) -> None:
    """ValueError unless `value` is a whole number of that range."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(
            f"{name} must be a whole number from {least} to "
            f"{most}: {value!r}"
        )


# %% book/chapters/97_serving_details.md, cell 5
def check_engine(inputs: dict[str, Any]) -> None:
    """ValueError for an engine that makes no sense."""
    context = inputs["config"].context
    check_count("slots", inputs["slots"], 1, 4096)
    if inputs["context"] is not None:
        check_count("context", inputs["context"], 1, context)
    check_count("prefill_chunk", inputs["prefill_chunk"], 16, 2**20)
    check_count("max_waiting", inputs["max_waiting"], 1, 2**20)
    mesh = inputs["model"].mesh
    devices = [] if mesh is None else mesh.devices.ravel().tolist()
    if len({d.process_index for d in devices}) > 1:
        raise ValueError(
            "an engine runs in one process: give it a mesh of this "
            "process's devices"
        )
    kind = inputs["model"].kv_cache
    if isinstance(cache_kind(kind), Paged):
        raise ValueError(
            "an engine grows and copies whole rows, which kv_cache "
            f"{kind!r} has in pages: load the model with kv_cache "
            "'float' or 'int8'"
        )


# %% book/chapters/97_serving_details.md, cell 6
def check_length(prompt: Any, new: Any, context: int) -> None:
    """ValueError unless prompt and new tokens fit into a row."""
    check_count("max_new_tokens", new, 1, context)
    length = len(prompt) if isinstance(prompt, list) else 0
    needed = length + new - 1               # the last is never read
    if needed > context:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {new} new ones "
            f"need {needed} slots, a row has {context}: shorten the "
            "prompt, ask for fewer, or set truncate"
        )


# %% book/chapters/97_serving_details.md, cell 7
def check_numbers_alone(request: Request) -> None:
    """ValueError where a setting is a list: there is one prompt."""
    for name in ("temperature", "top_p", "top_k", "seed"):
        value = getattr(request, name)
        if np.ndim(value):
            raise ValueError(
                f"{name} must be one number: {value!r:.60}")


# %% book/chapters/97_serving_details.md, cell 8
MOST_BIAS = 1e9                             # float32 can add to it


def check_bias(bias: Any, vocab_size: int) -> None:
    """ValueError unless each id has a finite number."""
    try:
        ids, values = list(bias), [float(v) for v in bias.values()]
    except (TypeError, ValueError, AttributeError):
        raise TypeError(
            f"logit_bias must map ids to numbers: {bias!r:.80}"
        ) from None
    for i, value in zip(ids, values):
        there = type(i) is int and 0 <= i < vocab_size
        if not there or not abs(value) <= MOST_BIAS:
            raise ValueError(
                f"logit_bias of {i!r} is {value}: it takes ids from 0 "
                f"to {vocab_size - 1} and numbers up to {MOST_BIAS:g}"
            )


# %% book/chapters/97_serving_details.md, cell 9
def check_stop(stop: Any, model: Any) -> None:
    """TypeError or ValueError unless `stop` are strings to find."""
    strings = isinstance(stop, (list, tuple))
    if not strings or not all(isinstance(s, str) and s for s in stop):
        raise TypeError(
            f"stop must be a list of strings, none empty: {stop!r:.80}")
    if stop:
        model.require_tokenizer()


# %% book/chapters/97_serving_details.md, cell 10
def check_constraint(constraint: Any) -> None:
    """TypeError unless it has what a constraint has."""
    for name in ("mask", "accept", "done"):
        if constraint is not None and not hasattr(constraint, name):
            raise TypeError(
                f"a constraint needs mask(), accept(token) and done: "
                f"{constraint!r:.60} has no {name}"
            )


# %% book/chapters/97_serving_details.md, cell 11
def check_submit(inputs: dict[str, Any]) -> None:
    """TypeError or ValueError for a request that cannot be run."""
    request: Request = inputs["request"]
    model, config = inputs["model"], inputs["config"]
    prompt, new = inputs["prompt"], request.max_new_tokens
    check_length(prompt, new, inputs["context"])
    check_numbers_alone(request)
    announce(
        None, "generate_ids", prompts=[prompt], max_new_tokens=new,
        temperature=request.temperature, top_p=request.top_p,
        top_k=request.top_k, seed=request.seed or 0, config=config,
    )
    check_stop(request.stop, model)
    check_bias(request.logit_bias, config.vocab_size)
    if request.logprobs is not None:
        check_count("logprobs", request.logprobs, 0, TOP)
    if request.experts:
        expert_layers(config)
    if request.experts and not model.in_memory:
        raise ValueError(
            "experts are kept of a model in memory: load it without "
            "stream=..."
        )
    check_constraint(request.constraint)


# %% book/chapters/97_serving_details.md, cell 12
def check_serving(mesh: Any, call: str, inputs: dict[str, Any]) -> None:
    """ValueError or TypeError for what an engine cannot do."""
    if call == "Engine":
        check_engine(inputs)
    if call == "submit":
        check_submit(inputs)
