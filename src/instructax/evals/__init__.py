"""The metrics of the public tasks (paper, appendix D): texts and log-probabilities in, shares and scores out."""
