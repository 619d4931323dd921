"""Triton kernels: module <stem> holds the launchers <op>_fwd, <op>_bwd, out-variants like every backend's (imported on first use)."""
