"""Specs: plain data that checks itself, to JSON and back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import pytest

from annotated_moe.attention import AttentionSpec, Causal, Window
from annotated_moe.families.grok import grok_config
from annotated_moe.rope import Llama3Rope, Rope
from annotated_moe.specs import (
    SPECS,
    OneOf,
    Positive,
    Range,
    Size,
    Spec,
    expected_by,
    fits_type,
    from_json,
    to_json,
)

ATTENTION = AttentionSpec(4, 2, 8, 0.35, softcap=30.0)
COLOURS: Mapping[str, Any] = {"red": 1, "blue": 2}


@dataclass(frozen=True)
class Every(Spec):
    """A field of each type."""

    size: Size = 1
    factor: Positive = 1.0
    name: Annotated[str, OneOf(COLOURS)] = "red"
    flag: bool = False
    ids: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")
    inner: Rope | None = None
    least: Annotated[float, Range(-1)] = 0.0


@pytest.mark.parametrize(
    "field, good",
    [
        ("size", [1, 2**31 - 1]),
        ("factor", [1, 1e-30, 2.5]),
        ("name", ["red", "blue"]),
        ("flag", [True, False]),
        ("ids", [(), (1,), (1, -2, 3)]),
        ("pair", [(1, "a")]),
        ("inner", [None, Rope(), Llama3Rope()]),
        ("least", [-1, 0.5]),
    ],
)
def test_what_a_type_allows_is_taken(field, good):
    for value in good:
        assert getattr(Every(**{field: value}), field) == value


@pytest.mark.parametrize(
    "field, wanted, bad",
    [
        ("size", "an int of 1 or more", [0, -1, 1.0, True, "1", None]),
        (
            "factor",
            "a number above 0",
            [0, -1.0, float("nan"), float("inf"), "x", True, None],
        ),
        ("name", "text one of red, blue", ["green", 1, None]),
        ("flag", "true or false", [0, 1, "true", None]),
        ("ids", "a list of an int", [[1], (1.0,), ("a",), 3, (True,)]),
        ("pair", "a list of an int", [(1,), (1, 2), ("a", 1), (1, "a", 2)]),
        ("inner", "Rope or None", [3, "rope", Causal(), Rope]),
        ("least", "a number of -1 or more", [-1.5, float("-inf")]),
    ],
)
def test_what_a_type_does_not_allow_is_one_clear_error(field, wanted, bad):
    for value in bad:
        with pytest.raises(ValueError) as error:
            Every(**{field: value})
        assert str(error.value).startswith(f"{field} must be {wanted}: ")


def test_the_error_names_the_value_and_stays_short():
    with pytest.raises(ValueError, match="^size must be an int of 1 or more: 'xx"):
        Every(size="x" * 10_000)
    try:
        Every(size="x" * 10_000)
    except ValueError as error:
        assert len(str(error)) < 300


def test_a_table_may_grow_later(monkeypatch):
    """What a later chapter registers is allowed from then on."""
    with pytest.raises(ValueError, match="one of red, blue"):
        Every(name="green")
    monkeypatch.setitem(COLOURS, "green", 3)
    assert Every(name="green").name == "green"


def test_checks_run_whenever_a_spec_is_made():
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        replace(ATTENTION, q_heads=3)
    with pytest.raises(ValueError, match="high 1.0 below low 2.0"):
        Llama3Rope(low=2.0, high=1.0)


def test_types_are_said_in_words():
    assert expected_by(Size | None) == "an int of 1 or more or None"
    assert expected_by(tuple[Positive, ...]) == "a list of a number above 0"
    assert fits_type(object(), Any)


SPECIMENS = {
    "flat": Rope(500000.0),
    "nested": replace(ATTENTION, rope=Llama3Rope(factor=32.0), mask=Window(16)),
    "every": Every(ids=(3, 4), inner=Rope(), pair=(2, "b")),
    "model": grok_config(64, 32, 16, 32, 3, 4, 2, 4, 4, 2),
}


@pytest.mark.parametrize("name", SPECIMENS)
def test_to_json_and_back(name):
    spec = SPECIMENS[name]
    text = json.dumps(to_json(spec))
    back = from_json(json.loads(text))
    assert back == spec and hash(back) == hash(spec) and type(back) is type(spec)


def test_json_says_each_class_by_its_name():
    assert to_json(replace(ATTENTION, mask=Window(16)))["mask"] == {
        "spec": "Window",
        "size": 16,
    }
    assert SPECS["Window"] is Window


def test_a_missing_field_has_its_default():
    assert from_json({"spec": "Rope"}) == Rope()


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"base": 10000.0}, "spec is None, which is not known"),
        ({"spec": "Popen", "args": ["ls"]}, "spec is 'Popen', which is not known"),
        ({"spec": ["Rope"]}, "spec is .*, which is not known"),
        ({"spec": "Rope", "bass": 1.0}, "Rope has no field 'bass'"),
        ({"spec": "Rope", "base": "10"}, "base must be a number above 0: '10'"),
        ({"spec": "Rope", "base": 1e999}, "base must be a number above 0: inf"),
        ({"spec": "Window", "size": {"spec": "Rope"}}, "size must be an int"),
        ({"spec": "AttentionSpec", "q_heads": 4}, "missing 3 required"),
    ],
)
def test_other_json_is_one_clear_error(raw, message):
    with pytest.raises(ValueError, match=message):
        from_json(raw)


def test_an_int_is_a_float_where_a_number_is_asked_for():
    spec = Every(factor=2, size=2, least=-1)
    kinds = [type(v) for v in (spec.factor, spec.size, spec.least)]
    assert kinds == [float, int, float]


@pytest.mark.parametrize("value", [10**400, 1e308, 1e-300, float("nan")])
def test_a_number_that_float32_has_not(value):
    with pytest.raises(ValueError, match="factor must be a number above 0"):
        Every(factor=value)


@pytest.mark.parametrize("value", [2**31, 2**63, 10**400])
def test_a_size_of_more_than_32_bits(value):
    with pytest.raises(ValueError, match="size must be an int .*, in 32 bits: "):
        Every(size=value)
