"""How near an accelerator's ceilings the samplers come, section by section."""
