"""The Triton kernels, a module each with ``launch``: same arguments and result as the reference.

Imported at an operator's first launch, so that Triton is not needed where none runs.
"""
