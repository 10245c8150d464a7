"""Section 11 of the design, measured: ``python -m tests.benchmarks`` prints the table of docs/performance.md.

What it does not do: it asserts nothing. A time depends on the machine's mood, so no test stands on one.
"""
