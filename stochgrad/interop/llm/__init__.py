"""Language models from GGUF files."""

from stochgrad.interop.llm._gguf import read_gguf as read_gguf
from stochgrad.interop.llm._gguf import smollm2_path as smollm2_path
from stochgrad.interop.llm._llama import Config as Config
from stochgrad.interop.llm._llama import Llama as Llama
from stochgrad.interop.llm._llama import llama as llama
from stochgrad.interop.llm._llama import llama_cache as llama_cache
