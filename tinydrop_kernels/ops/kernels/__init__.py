"""The Triton kernels. Each operator's module has a ``launch`` with the arguments and the result of the reference.

A module is imported at its operator's first launch, so that Triton is not needed where no kernel runs.
"""
