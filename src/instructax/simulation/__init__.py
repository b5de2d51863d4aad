"""The simulated world: data for the whole pipeline, with a known true reward.

A model of a few hundred thousand parameters learns something visible in this world within
minutes on two CPU cores. `write.write_world` writes pretraining text, demonstrations,
comparisons and prompts in the ordinary data schema, so no later stage can tell that the
people are simulated. `judge.judge` computes the true reward, which no stage reads.

Departure from the paper: its prompts come from customers and its labels from contractors
(section 3). Both are simulated here.
"""
