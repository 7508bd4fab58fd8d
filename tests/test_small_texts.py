"""The texts of the small model: sums that no training text has seen."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest

from annotated_moe.checkpoints import small_model
from annotated_moe.data import held_back

SCRIPTS = Path(__file__).parent.parent / "scripts"
LINE = re.compile(r"(\d+) \+ (\d+) = (\d+) (right|wrong)")


@pytest.fixture(scope="module")
def script():
    found = importlib.util.spec_from_file_location(
        "small_texts", SCRIPTS / "small_texts.py"
    )
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    module.SUM_PAGES = 300
    return module


@pytest.fixture(scope="module")
def pages(script):
    ((_, pages),) = script.sums()
    return pages


def test_the_recipe_holds_back_what_the_sample_is_of(script):
    recipe = tomllib.loads((SCRIPTS / "small.toml").read_text("utf-8"))
    assert recipe["data"]["validation"] == script.HELD_BACK
    assert recipe["data"]["files"] == script.NAMES
    assert recipe["data"]["separator"] == script.BREAK
    shown = json.loads((Path(small_model()) / "held_out.json").read_text("utf-8"))
    assert list(shown) == script.NAMES
    whole = shown["sums"][:-1]      # the last one may be cut
    assert whole and all(held_back(text, script.HELD_BACK) for text in whole)


def test_a_line_says_whether_it_is_right(pages, script):
    lines = [line for page in pages for line in page.splitlines()]
    right = 0
    for line in lines:
        a, b, c, verdict = LINE.fullmatch(line).groups()
        assert (int(a) + int(b) == int(c)) == (verdict == "right"), line
        right += verdict == "right"
    assert abs(right / len(lines) - script.RIGHT) < 0.03


def test_no_pair_is_on_both_sides(pages, script):
    sides = {True: set(), False: set()}
    for page in pages:
        pairs = {m.groups()[:2] for m in map(LINE.match, page.splitlines())}
        sides[held_back(page, script.HELD_BACK)] |= pairs
    assert sides[True] and not sides[True] & sides[False]
    # The order of a pair is part of it: 17 + 25 may be learned, 25 + 17 asked.


def test_a_sample_is_of_held_out_texts_alone(script):
    texts = [f"{i}\n" * 100 for i in range(2000)]
    shown = script.sample(texts)
    held = [text for text in texts if held_back(text, script.HELD_BACK)]
    assert shown and all(any(t.startswith(s) for t in held) for s in shown)
    assert sum(map(len, shown)) <= script.SAMPLE
