"""A posterior from one call."""

from stochgrad.inference._infer import infer as infer
from stochgrad.inference._nuts import nuts as nuts
