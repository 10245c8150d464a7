"""JSONL in, JSONL out: many prompts through one model, on one process or many."""

from .requests import Refused as Refused
from .runner import processes as processes
from .runner import run as run
from .store import Summary as Summary

__all__ = ["Refused", "Summary", "processes", "run"]
