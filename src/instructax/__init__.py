"""InstructGPT (Ouyang et al., 2022) in JAX and Flax; import its modules by their names."""

__version__ = "0.1.0"
