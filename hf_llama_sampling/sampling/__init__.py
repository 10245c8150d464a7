"""LLAMA2's sampling rule on tensors, its random numbers, and transformers' processors made of them."""
