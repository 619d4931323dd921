"""`python -m palm_kernels`: what is built and which backend serves each op."""

from .dispatch import info

info()
