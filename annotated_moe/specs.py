# Generated from book/chapters/04_attention.md, book/chapters/05_moe.md, book/chapters/07b_layer.md, book/chapters/92_specs.md by `make sync`; edit the chapters.
"""What a part of a model is, as plain data that checks itself.
"""

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

# %% book/chapters/04_attention.md, cell 74
SPECS: dict[str, type["Spec"]] = {}
CHECKS: list[Callable[["Spec"], None]] = []


class Spec:
    """What a part of a model is: a frozen dataclass of plain data.

    Each class is known by its name in `SPECS`; each object is checked
    when it is made.
    """

    __no_type_check__ = True                # `CHECKS` say it better

    def __init_subclass__(cls) -> None:
        SPECS[cls.__name__] = cls

    def __post_init__(self) -> None:
        for check in CHECKS:
            check(self)
        self.check()

    def check(self) -> None:
        """ValueError where fields that are fine alone do not fit."""


# %% book/chapters/04_attention.md, cell 75
@dataclass(frozen=True)
class Range:
    """Numbers from `least` on, or only those above it."""

    least: int
    above: bool = False

    def holds(self, value: int | float) -> bool:
        return value > self.least if self.above else value >= self.least

    def __str__(self) -> str:
        if self.above:
            return f"above {self.least:g}"
        return f"of {self.least:g} or more"


Size = Annotated[int, Range(1)]
Positive = Annotated[float, Range(0, above=True)]


# %% book/chapters/05_moe.md, cell 91
@dataclass(frozen=True)
class OneOf:
    """The names that a table registers, now or in later chapters."""

    table: Mapping[str, Any]

    def holds(self, value: str) -> bool:
        return value in self.table

    def __str__(self) -> str:
        return f"one of {', '.join(self.table)}"


# %% book/chapters/07b_layer.md, cell 15
def to_json(value: Any) -> Any:
    """A spec as JSON: its fields, and the name of its class."""
    if isinstance(value, Spec):
        plain = {name: to_json(v) for name, v in vars(value).items()}
        return {"spec": type(value).__name__, **plain}
    if isinstance(value, tuple):
        return [to_json(v) for v in value]
    return value


# %% book/chapters/07b_layer.md, cell 16
def from_json(raw: Any) -> Any:
    """What `to_json` wrote. ValueError for anything else.

    Only classes that are registered in `SPECS` are made.
    """
    if isinstance(raw, list):
        return tuple(from_json(v) for v in raw)
    if not isinstance(raw, dict):
        return raw
    own = {name: from_json(v) for name, v in raw.items()}
    name = own.pop("spec", None)
    kind = SPECS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"spec is {name!r:.60}, which is not known")
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    for field in own:
        if field not in known:
            raise ValueError(f"{name} has no field {field[:40]!r}")
    try:
        return kind(**own)
    except TypeError as error:
        said = str(error).replace("__init__() ", "")
        raise ValueError(said) from None


# %% book/chapters/92_specs.md, cell 4
def expected_by(hint: Any) -> str:
    """What a field's type asks for, in words."""
    base = typing.get_origin(hint)
    args = typing.get_args(hint)
    if base is Annotated:
        return f"{expected_by(args[0])} {args[1]}"
    if base in (typing.Union, types.UnionType):
        return " or ".join(map(expected_by, args))
    if base is tuple:
        return f"a list of {expected_by(args[0])}"
    words = {int: "an int", float: "a number", bool: "true or false",
             str: "text", types.NoneType: "None"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


# %% book/chapters/92_specs.md, cell 7
def in_range(value: int | float) -> bool:
    """Whether float32 has a number near it, and not 0 for it."""
    return value == 0 or 2.0**-126 <= abs(value) < 2.0**127


def fits_type(value: Any, hint: Any) -> bool:
    """Whether a value is what a field's type asks for."""
    base = typing.get_origin(hint)
    args = typing.get_args(hint)
    if base is Annotated:
        return fits_type(value, args[0]) and args[1].holds(value)
    if base in (typing.Union, types.UnionType):
        return any(fits_type(value, arg) for arg in args)
    if base is tuple:
        if type(value) is not tuple:
            return False
        if args[1:] == (...,):
            return all(fits_type(v, args[0]) for v in value)
        return len(value) == len(args) and all(
            map(fits_type, value, args)
        )
    if hint is float:
        return type(value) in (int, float) and in_range(value)
    if hint is int:
        return type(value) is int and -(2**31) <= value < 2**31
    if hint in (bool, str):
        return type(value) is hint
    return hint is Any or isinstance(value, hint)


# %% book/chapters/92_specs.md, cell 10
def check_types(spec: Spec) -> None:
    """ValueError for the first field that its type does not allow."""
    for field in fields(spec):  # type: ignore[arg-type]
        value = getattr(spec, field.name)
        if not fits_type(value, field.type):
            said = expected_by(field.type)
            number = type(value) in (int, float)
            if number and 2**31 <= abs(value) < float("inf"):
                said += ", in 32 bits"
            raise ValueError(
                f"{field.name} must be {said}: {value!r:.200}"
            )
        if type(value) is int and "number" in expected_by(field.type):
            # As in JSON, 1 is 1.0 where a number is asked for.
            object.__setattr__(spec, field.name, float(value))


CHECKS.append(check_types)
