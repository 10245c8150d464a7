"""Constants that several rooms need: the version, and the reference's defaults. Imports nothing."""

__version__ = "0.1.0"

TEMPERATURE = 0.6
TOP_P = 0.9
