"""Two thousand damaged files; `python benchmarks/fuzz.py` tries 100,000."""

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"


def test_readers_of_damaged_files():
    """In a process of its own: an audit hook stays for good."""
    command = [sys.executable, str(FUZZ), "--count", "2000", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.replace(",", "").split() for line in done.stdout.splitlines()]
    counts = {(row[0], row[1]): int(row[2]) for row in rows[:-1]}
    assert set(counts) == {
        (kind, what)
        for kind in ("pickle", "pth", "safetensors")
        for what in ("read", "refused")
    }
    assert sum(counts.values()) >= 2000
