"""The public tasks' measures (paper, appendix D): what a network makes of contexts, and
shares and scores of that."""
