"""A small procedural world in which the whole method learns something visible in minutes on
two CPU cores.

`write.write_world` writes pretraining text, demonstrations, comparisons and prompts in the
one supported schema, so that nothing downstream knows that the people are simulated;
`judge.judge` is the truth that no stage is shown. The paper has no such world: its prompts
come from customers and its labels from contractors (section 3).
"""
