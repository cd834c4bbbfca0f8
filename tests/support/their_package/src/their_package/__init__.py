"""A package of somebody else's, which adds a model, a reward and an algorithm by entry points."""
