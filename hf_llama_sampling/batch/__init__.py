"""JSONL in, JSONL out: many prompts through one model, on one process or many."""

from .processes import process_state as process_state
from .requests import Refused as Refused
from .runner import run as run
from .store import Summary as Summary

__all__ = ["Refused", "Summary", "process_state", "run"]
