# Generated from book/chapters/07b_layer.md, book/chapters/15_llama.md, book/chapters/16_mixtral.md, book/chapters/18_llama4.md by `make sync`; edit the chapters.
"""The models that are known by name.
"""

from annotated_moe.config import ModelConfig
from annotated_moe.families.grok import grok_config
from annotated_moe.families.llama import LLAMAS
from annotated_moe.families.llama4 import LLAMA_4S
from annotated_moe.families.mixtral import MIXTRALS
from annotated_moe.families.olmoe import OLMOES
from annotated_moe.families.qwen import QWENS

# %% book/chapters/07b_layer.md, cell 8
PRESETS: dict[str, ModelConfig] = {"grok-1": grok_config()}


# %% book/chapters/15_llama.md, cell 44
PRESETS |= LLAMAS


# %% book/chapters/16_mixtral.md, cell 86
PRESETS |= MIXTRALS | QWENS | OLMOES


# %% book/chapters/18_llama4.md, cell 69
PRESETS |= LLAMA_4S
