"""Language models from GGUF files and directories of safetensors."""

from stochgrad.interop.llm._gguf import read_gguf as read_gguf
from stochgrad.interop.llm._gguf import smollm2_path as smollm2_path
from stochgrad.interop.llm._llama import Config as Config
from stochgrad.interop.llm._llama import Llama as Llama
from stochgrad.interop.llm._llama import RopeScaling as RopeScaling
from stochgrad.interop.llm._llama import llama as llama
from stochgrad.interop.llm._llama import llama_cache as llama_cache
from stochgrad.interop.llm._pretrained import from_pretrained as from_pretrained
from stochgrad.interop.llm._pretrained import save_pretrained as save_pretrained
