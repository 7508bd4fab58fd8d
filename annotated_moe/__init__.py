# Generated from book/chapters/08c_generate.md, book/chapters/09c_layouts.md, book/chapters/11_streaming.md, book/chapters/19_vocabularies.md, book/chapters/27_int8_on_a_cpu.md, book/chapters/28_steps.md, book/chapters/99_command_line.md by `make sync`; edit the chapters.
"""The front door: a Grok-1-class mixture-of-experts model that a book
builds, piece by piece.
"""

from importlib.metadata import version

import annotated_moe.chat as chat_module
from annotated_moe.checkpoints import LOADERS, load, save, verify
from annotated_moe.config import ModelConfig
from annotated_moe.families import PRESETS
from annotated_moe.formats.files import CheckpointError
from annotated_moe.generate import LOOPS, Model, Session
from annotated_moe.parallel import make_mesh
from annotated_moe.quantization import QuantizedTensor
from annotated_moe.steps import fused_steps
from annotated_moe.streaming import load_from_disk
from annotated_moe.tokenizer import Tokenizer
from annotated_moe.turned import int8_head

# %% book/chapters/08c_generate.md, cell 33
__all__ = [
    "PRESETS", "Model", "ModelConfig", "QuantizedTensor", "Session",
    "Tokenizer", "make_mesh",
]


# %% book/chapters/09c_layouts.md, cell 72
__all__.extend(
    entry.__name__ for entry in (CheckpointError, load, save, verify)
)


# %% book/chapters/11_streaming.md, cell 71
LOADERS["disk"] = load_from_disk


# %% book/chapters/19_vocabularies.md, cell 43
chat_module.register_chat()


# %% book/chapters/27_int8_on_a_cpu.md, cell 37
__all__.append(int8_head.__name__)


# %% book/chapters/28_steps.md, cell 44
LOOPS.append(fused_steps)


# %% book/chapters/99_command_line.md, cell 26
def __getattr__(name: str) -> str:
    """`__version__`, from what was installed."""
    if name != "__version__":
        raise AttributeError(f"annotated_moe has no {name!r}")
    return version("annotated-moe")
