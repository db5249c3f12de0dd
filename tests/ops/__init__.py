"""The operators: one suite, whose cases run on every backend that the machine has.

Oracles are written from the contracts, in float64, and share no code with the package. Needs torch, pytest and, for its
kernels, Triton; without a GPU they run in Triton's interpreter.
"""
