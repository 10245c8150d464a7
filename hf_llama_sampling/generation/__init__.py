"""`generate` and scoring on token ids, on transformers' public API."""
