"""Tests of the operators. Each case runs on every backend that the machine has.

The oracles are written from the operators' contracts, compute in float64 and share no code with the package. The tests
need torch and pytest, and Triton for its kernels. Without a GPU the kernels run in Triton's interpreter.
"""
