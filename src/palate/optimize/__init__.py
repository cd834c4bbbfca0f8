"""Optimisation of a black-box objective: queries within a budget, a surrogate fitted to the answers, updates on it."""

from __future__ import annotations

from palate.optimize.loop import Search, optimize, round_sizes
from palate.optimize.oracles import (
    call_with_timeout,
    command_oracle,
    http_oracle,
    load_oracle,
    noisy,
    validate_scores,
)
from palate.optimize.queries import Pictures, Queries
from palate.optimize.rounds import OracleError, query_round
from palate.optimize.start import from_recipe, identity_of
from palate.optimize.surrogate import Surrogate, fit_surrogate, mean_std, reward_features, ucb_bonus, with_one
from palate.rewards.learned import Features, leave_one_out, ridge_head
from palate.rewards.oracles import BUILT_IN, Oracle, colour_and_position, compressibility, exact_reward
from palate.runtime.deprecated import old_names

__all__ = [
    "BUILT_IN", "Features", "Oracle", "OracleError", "Pictures", "Queries", "Search", "Surrogate", "call_with_timeout",
    "colour_and_position", "command_oracle", "compressibility", "exact_reward", "fit_surrogate", "from_recipe",
    "http_oracle", "identity_of", "leave_one_out", "load_oracle", "mean_std", "noisy", "optimize",
    "query_round", "reward_features", "ridge_head", "round_sizes", "ucb_bonus", "validate_scores", "with_one",
]  # fmt: skip

__getattr__ = old_names(
    __name__,
    {
        "ask_round": query_round,
        "colour_position": colour_and_position,
        "numbers": validate_scores,
        "small_file": compressibility,
        "standard": mean_std,
        "within": call_with_timeout,
    },
)
