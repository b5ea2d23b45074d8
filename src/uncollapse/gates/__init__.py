"""PG-OP, the position-gated output projection: the module, how to install it in a live model, and what its gates broke."""
