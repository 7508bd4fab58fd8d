"""Try the first chapters of the book alone: `prefix.py 08 FOLDER`.

Tangles the chapters up to number 08 into FOLDER, imports every module from
there in a fresh process, and runs the notebook of the last of the chapters in
an empty directory. Where a first chapter needs a later one, this fails.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
# `-P` and the assertion: another package of this name may be installed.
IMPORT = """\
import importlib, sys
from pathlib import Path

folder = Path(sys.argv[1])
for file in sorted(folder.rglob("*.py")):
    parts = file.relative_to(folder.parent).with_suffix("").parts
    name = ".".join(parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    assert Path(module.__file__) == file, f"{name} comes from {module.__file__}"
print(len(list(folder.rglob("*.py"))), "modules imported")
"""


def chapters(root: Path) -> list[int]:
    """The numbers of the book's chapters."""
    names = root.glob("book/chapters/[0-9][0-9]*.md")
    return sorted({int(path.name[:2]) for path in names})


def chapter(text: str, root: Path) -> int:
    """A chapter's number, or the end with a sentence that has the range."""
    known, runs = chapters(root), list[list[int]]()
    if text.isdecimal() and int(text) in known:
        return int(text)
    for number in known:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = [f"{r[0]:02d} to {r[-1]:02d}" if r[1:] else f"{r[0]:02d}" for r in runs]
    sys.exit(
        f"N={text!r} is no chapter's number: N must be {', '.join(spans)}, as in"
        " make prefix N=08"
    )


def tangle(root: Path, number: int, into: Path) -> None:
    """The chapters up to `number`, and the package's other files."""
    if into.exists() and not (into / "annotated_moe").is_dir() and any(into.iterdir()):
        sys.exit(f"{into} is not a folder that this script has made")
    shutil.rmtree(into, ignore_errors=True)
    script = HERE / "annotated_moe/tangle.py"
    options = ["--root", root, "--upto", str(number), "--into", into]
    subprocess.run([sys.executable, "-P", script, *options], check=True)
    for file in root.glob("annotated_moe/**/*"):
        if file.is_file() and file.suffix not in (".py", ".pyc", ".new"):
            copy = into / file.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def notebooks(into: Path, number: int) -> Path:
    """A new directory with the notebooks of chapter `number`: 09, 09b, ..."""
    names = into.glob("book/chapters/*.ipynb")
    found = [path for path in names if int(path.name[:2]) == number]
    if not found:
        sys.exit(f"there is no chapter {number}")
    (into / "run").mkdir()
    for path in found:
        shutil.copy(path, into / "run")
    return into / "run"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number")
    parser.add_argument("into", type=Path)
    parser.add_argument("--root", type=Path, default=HERE)
    options = parser.parse_args()
    number, into = chapter(options.number, options.root), options.into.resolve()
    environment = {**os.environ, "PYTHONPATH": str(into)}
    pytest = ["-m", "pytest", "-q", "--nbmake", "--nbmake-timeout=600"]
    try:
        tangle(options.root, number, into)
        run = notebooks(into, number)
        for command in [
            ["-P", "-c", IMPORT, str(into / "annotated_moe")],
            ["-P", *pytest, "-c", os.devnull, "-p", "no:cacheprovider", "."],
        ]:
            subprocess.run(
                [sys.executable, *command], check=True, cwd=run, env=environment
            )
    except subprocess.CalledProcessError as error:
        return error.returncode
    print(f"The package of the chapters up to {number:02d} is in {options.into}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
