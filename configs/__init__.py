"""The values of every run: one module per stage with `get_config(size)`, and `sizes`.

Every number of a run is in one of these modules, with its unit or its place in the paper.
"""
