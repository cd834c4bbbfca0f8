"""From a person's choices to a reward: votes, features, a Bayesian linear taste, and words in its place.

`palate.taste.taste` has `fit_taste` and `Taste`, `palate.taste.votes` the store. Nothing is imported here, so that
looking at votes does not wait for torch.
"""
