"""Section 9 of the design, measured: ``python -m tests.benchmarks`` prints the table that the README quotes.

What it does not do: it asserts nothing. A time depends on the machine's mood, so no test stands on one.
"""
