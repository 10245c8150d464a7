"""Constants that several rooms need: the version, and default values. Imports nothing."""

__version__ = "0.1.0"

TEMPERATURE = 0.6
TOP_P = 0.9

# Batch runs
SEED = 1
BATCH_SIZE = 32  # rows
BATCH_TOKENS = 16_384  # rows x (longest prompt + most new tokens)
WINDOW = 1024  # records
