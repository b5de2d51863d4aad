"""With which values one run goes: one `get_config(size)` per stage; every number of a run
stands here."""
