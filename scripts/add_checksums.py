"""Write `checksums.json` beside the weights of a checkpoint that has none.

    python scripts/add_checksums.py annotated_moe/small

For checkpoints from before there were checksums; their weights do not change.
It believes what it finds, so run it on files that you trust.
"""

import hashlib
import sys
from pathlib import Path

from annotated_moe import checkpoints
from annotated_moe.formats.writing import write_json

opened = checkpoints.open_checkpoint(Path(sys.argv[1]))
sums = {
    name: hashlib.sha256(array.tobytes()).hexdigest()
    for name, array in checkpoints.stored(opened).items()
}
path = opened.folder / "checksums.json"
if path.exists():
    sys.exit(f"{path} exists already")
write_json(path, {"sha256": sums})
print(f"{len(sums)} tensors, {checkpoints.verify(opened.folder)} verified")
