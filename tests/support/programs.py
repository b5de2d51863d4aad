"""Inspects the text of compiled programs."""

import math
import re


def vocabulary_buffers(program: str, vocab_size: int) -> set[int]:
    """Sizes, in elements, of the arrays in a compiled program with a vocabulary axis.

    XLA may merge axes, so every array counts whose size is a multiple of `vocab_size`. Use
    a prime vocabulary size that no other size of the program is a multiple of.
    """
    shapes = re.findall(r"\b(?:bf16|f16|f32|f64|s32|u32|pred)\[([0-9,]+)\]", program)
    sizes = {math.prod(int(axis) for axis in shape.split(",")) for shape in shapes}
    return {size for size in sizes if size % vocab_size == 0}
