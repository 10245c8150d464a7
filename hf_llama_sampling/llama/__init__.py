"""The `llama`-compatible API: text, dialogs, tokenizers and checkpoints."""
