"""``python -m hf_llama_sampling``: the same as ``hf-llama-sampling``."""

import sys

try:
    from .cli import main

    status = main()
except KeyboardInterrupt:
    status = 130
sys.exit(status)
