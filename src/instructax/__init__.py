"""InstructGPT's method (Ouyang et al., 2022) in JAX and Flax; each module is imported by
its own name."""

__version__ = "0.1.0"
