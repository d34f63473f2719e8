"""The kernel cache: one readable folder an entry, named by the hash of what it was made from.

`entry` is the form of an entry and its verification, `store` its life, `upkeep` what the command
line does with many of them, `archive` the way to another machine. Nothing here imports torch."""

from spcomp.cache.entry import Damaged, Entry, Key
from spcomp.cache.store import Store, default_store

__all__ = ["Damaged", "Entry", "Key", "Store", "default_store"]
