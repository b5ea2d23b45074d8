"""PG-OP, the position-gated output projection: the module, its way in and out of a live model, and what its gates broke."""
