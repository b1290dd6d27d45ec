"""Language models as policies, from GGUF files and directories of safetensors.

Needs the extra ``[llm]``.
"""

from stochgrad.interop.llm import Config as Config
from stochgrad.interop.llm import Llama as Llama
from stochgrad.interop.llm import RopeScaling as RopeScaling
from stochgrad.interop.llm import from_pretrained as from_pretrained
from stochgrad.interop.llm import llama as llama
from stochgrad.interop.llm import llama_cache as llama_cache
from stochgrad.interop.llm import read_gguf as read_gguf
from stochgrad.interop.llm import save_pretrained as save_pretrained
from stochgrad.interop.llm import smollm2_path as smollm2_path

__all__ = [
    "Config",
    "Llama",
    "RopeScaling",
    "from_pretrained",
    "llama",
    "llama_cache",
    "read_gguf",
    "save_pretrained",
    "smollm2_path",
]


def __dir__() -> list[str]:
    return sorted(__all__)
