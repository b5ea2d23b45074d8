"""Is a diagnosis right? Known damage is planted into healthy models, and the rules are scored on what they say of it."""
