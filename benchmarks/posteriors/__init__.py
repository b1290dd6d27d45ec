"""Posteriors of the kind that people meet, with long runs of NUTS to compare with."""

from . import discrete, hierarchies, linear, whole

ENTRIES = {
    entry.name: entry
    for entry in [*linear.ENTRIES, *discrete.ENTRIES, *hierarchies.ENTRIES, *whole.ENTRIES]
}
