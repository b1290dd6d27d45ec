"""Checks on draws."""

from stochgrad.diagnostics._errors import mcse as mcse
from stochgrad.diagnostics._errors import rhat as rhat
from stochgrad.diagnostics._temperature import Temperatures as Temperatures
from stochgrad.diagnostics._temperature import temperatures as temperatures
