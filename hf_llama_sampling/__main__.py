"""``python -m hf_llama_sampling``: the same as ``hf-llama-sampling``."""

import sys

from .cli import main

sys.exit(main())
