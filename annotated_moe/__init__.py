# Generated from book/chapters/08_model.md, book/chapters/09c_layouts.md, book/chapters/19_vocabularies.md by `make sync`; edit the chapters.
"""The front door: a Grok-1-class mixture-of-experts model that a book
builds, piece by piece.
"""

import annotated_moe.chat as chat_module
from annotated_moe.checkpoints import load, save, verify
from annotated_moe.config import ModelConfig
from annotated_moe.families import PRESETS
from annotated_moe.formats.files import CheckpointError
from annotated_moe.generate import Model, Session
from annotated_moe.parallel import make_mesh
from annotated_moe.quantization import QuantizedTensor
from annotated_moe.tokenizer import Tokenizer

# %% book/chapters/08_model.md, cell 125
__all__ = [
    "PRESETS", "Model", "ModelConfig", "QuantizedTensor", "Session",
    "Tokenizer", "make_mesh",
]


# %% book/chapters/09c_layouts.md, cell 54
__all__.extend(
    entry.__name__ for entry in (CheckpointError, load, save, verify)
)


# %% book/chapters/19_vocabularies.md, cell 31
chat_module.register_chat()
