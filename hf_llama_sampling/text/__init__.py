"""Texts: what tokens spell, where a text ends, and how it comes piece by piece."""
