"""From a person's choices to a reward: votes, features, a Bayesian linear taste, and words in its place."""

from palate.taste.features import Features, Scaling, features_of, scaling_of
from palate.taste.learner import Posterior, fit
from palate.taste.reward import TasteReward
from palate.taste.taste import Choice, Taste, fit_taste, mixed
from palate.taste.votes import Picture, Vote, VoteStore

__all__ = ["Choice", "Features", "Picture", "Posterior", "Scaling", "Taste", "TasteReward", "Vote", "VoteStore",
           "features_of", "fit", "fit_taste", "mixed", "scaling_of"]  # fmt: skip
