"""The groups that act on a live model: which rows of which parameter make which channel, and what leaves the output alone."""
