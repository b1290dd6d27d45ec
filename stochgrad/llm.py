"""Language models as policies, from GGUF files. Needs the extra ``[llm]``."""

from stochgrad.interop._llama import Config as Config
from stochgrad.interop._llama import Llama as Llama
from stochgrad.interop._llama import llama as llama
from stochgrad.interop._llama import llama_cache as llama_cache
from stochgrad.interop._llama import read_gguf as read_gguf
from stochgrad.interop._llama import smollm2_path as smollm2_path
