"""Weights on their way: what a node needs of a model as a list of files, who sends their pieces, and where they are kept."""
