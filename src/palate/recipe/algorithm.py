"""A recipe's algorithm as an object, for which no model's libraries are needed."""

from __future__ import annotations

from palate.algorithms import table as algorithms
from palate.core import Algorithm
from palate.recipe.settings import Recipe


def build_algorithm(recipe: Recipe) -> Algorithm:
    """The recipe's algorithm, in its first state."""
    return algorithms.find(recipe.algorithm.name).make(recipe.algorithm)
