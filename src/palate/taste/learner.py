"""A linear preference learned from choices between two pictures: Bayesian logistic regression on feature differences.

    u(x) = w'z(x),  w ~ N(0, (a / D) I),  P(left is better) = s(u_left - u_right),  s the logistic function
The Bradley-Terry model (1952) with a Gaussian prior, by Laplace's approximation; a is chosen by its log evidence
(Rasmussen and Williams 2006, sections 3.4 and 3.7; MacKay 1992). With dZ (n, D) = z_left - z_right, K = (a/D) dZ dZ',
y in {1, 1/2, 0} (a tie is two half votes) and weights c:
    psi(alpha) = sum c [y log s(f) + (1 - y) log s(-f)] - f'alpha / 2,   f = K alpha        maximised by Newton steps
    W = c s(f) s(-f),   B = I + W^1/2 K W^1/2 = L L'
    w = (a/D) dZ'alpha,   S = (a/D) I - (a/D)^2 V'V,   V = L^-1 W^1/2 dZ                     posterior mean, covariance
    log evidence = psi - sum log L_ii
    P(x over y) = s(m / sqrt(1 + pi v / 8)),   m = w'd, v = d'S d, d = z(x) - z(y)
The next pair to ask about is the one of the largest mutual information with w (BALD, Houlsby et al. 2011, 1112.5745):
    H(E s(m + sqrt(v) g)) - E H(s(m + sqrt(v) g)),   g ~ N(0, 1), by Gauss-Hermite quadrature
Everything is float64 numpy: the fit of 40 votes takes a few milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from palate.runtime.errors import InputError

Array = NDArray[np.float64]
Numbers = NDArray[np.intp]
PRIORS = (1.0, 3.0, 10.0, 30.0, 100.0)  # candidates of a
NEWTON_STEPS = 100
QUADRATURE = 15  # points
MANY = 200  # votes above which the equations are solved in the weights, and votes are left out in so many parts


class Posterior(NamedTuple):
    """N(mean, covariance) of w. `latent`: the utilities' differences f of the votes that it was fitted to."""

    mean: Array  # (D,)
    covariance: Array  # (D, D)
    prior: float  # a
    log_evidence: float
    latent: Array  # (n,)
    side: float = 0.0  # in logits: how much the left place itself was favoured

    def difference(self, d: Array) -> tuple[Array, Array]:
        """Mean and variance (n,) of the utility's difference for feature differences (n, D)."""
        return d @ self.mean, np.einsum("ni,ij,nj->n", d, self.covariance, d).clip(min=0)

    def probability(self, d: Array) -> Array:
        """P(first is better), (n,), with the weights integrated out (MacKay's approximation)."""
        m, v = self.difference(d)
        return logistic(m / np.sqrt(1 + math.pi * v / 8))

    def information(self, d: Array) -> Array:
        """What an answer about each pair tells about w, (n,), in nats: BALD."""
        m, v = self.difference(d)
        points, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE)
        p = logistic(m[:, None] + np.sqrt(v)[:, None] * points)
        weights = weights / weights.sum()
        return entropy(p @ weights) - entropy(p) @ weights


def logistic(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def entropy(p: Array) -> Array:
    """Of a coin, in nats."""
    p = p.clip(1e-300, 1 - 1e-16)
    return -p * np.log(p) - (1 - p) * np.log1p(-p)


def fit(
    differences: Array,
    outcomes: Array,
    weights: Array | None = None,
    *,
    priors: Sequence[float] = PRIORS,
    side_std: float = 0.0,
) -> Posterior:
    """The posterior under the prior of the largest evidence among `priors`.

    differences (n, D) = z_left - z_right; outcomes (n,): 1 the left picture, 0 the right one, 1/2 a tie. `side_std`:
    the prior standard deviation, in logits, of a constant that favours the left place; 0 = none.
    """
    d, y = np.asarray(differences, np.float64), np.asarray(outcomes, np.float64)
    c = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    if d.ndim != 2 or y.shape != (len(d),) or c.shape != y.shape:
        raise InputError(f"got {d.shape} differences, {y.shape} outcomes, {c.shape} weights; expected (n, D), (n,)")
    if not (np.isfinite(d).all() and ((y >= 0) & (y <= 1)).all() and (c >= 0).all()):
        raise InputError("differences must be finite, outcomes from 0 to 1, weights at least 0")
    if not priors or min(priors) <= 0:
        raise InputError(f"priors got {tuple(priors)!r}; expected numbers above 0")
    return max((_laplace(d, y, c, a, side_std) for a in priors), key=lambda found: found.log_evidence)


def _laplace(d: Array, y: Array, c: Array, a: float, side_std: float) -> Posterior:
    columns = d.shape[1]
    scale = a / columns
    if side_std:  # one more column, of a size that gives its weight the asked-for standard deviation
        d = np.column_stack([d, np.full(len(d), side_std / math.sqrt(scale))])
    if len(y) > MANY:
        return _in_weights(d, y, c, a, columns)
    gram = scale * d @ d.T
    alpha, psi = np.zeros(len(y)), _psi(np.zeros(len(y)), np.zeros(len(y)), y, c)
    for _ in range(NEWTON_STEPS):
        f = gram @ alpha
        p = logistic(f)
        w = c * p * (1 - p)
        root = np.sqrt(w)
        factor = np.linalg.cholesky(np.eye(len(y)) + root[:, None] * gram * root)
        b = w * f + c * (y - p)
        step = b - root * _solve(factor, root * (gram @ b)) - alpha
        alpha, better = _uphill(lambda at: _psi(at, gram @ at, y, c), alpha, step, psi)
        gained, psi = better - psi, max(better, psi)
        if gained < 1e-12:
            break
    f = gram @ alpha
    p = logistic(f)
    root = np.sqrt(c * p * (1 - p))
    factor = np.linalg.cholesky(np.eye(len(y)) + root[:, None] * gram * root)
    v = np.linalg.solve(factor, root[:, None] * d)
    mean = scale * d.T @ alpha
    covariance = scale * np.eye(d.shape[1]) - scale * scale * v.T @ v
    evidence = float(psi - np.log(np.diag(factor)).sum())
    side = float(mean[columns] * d[0, columns]) if side_std and len(d) else 0.0
    return Posterior(mean[:columns], covariance[:columns, :columns], float(a), evidence, f, side)


def _in_weights(d: Array, y: Array, c: Array, a: float, columns: int) -> Posterior:
    """The same posterior by Newton steps in w: n D^2 a step where the kernel takes n^3, so thousands of votes do.

    log |B| = log |I + (a/D) dZ'W dZ|, and psi's last term is -w'w D / (2 a).
    """
    scale, mean = a / columns, np.zeros(d.shape[1])

    def objective(w: Array) -> float:
        f = d @ w
        return float(-(c * (y * np.logaddexp(0, -f) + (1 - y) * np.logaddexp(0, f))).sum() - w @ w / (2 * scale))

    def curvature(w: Array) -> Array:
        p = logistic(d @ w)
        return np.eye(len(w)) + scale * (d * (c * p * (1 - p))[:, None]).T @ d

    psi = objective(mean)
    for _ in range(NEWTON_STEPS):
        slope = scale * d.T @ (c * (y - logistic(d @ mean))) - mean
        step = np.asarray(np.linalg.solve(curvature(mean), slope), np.float64)
        mean, better = _uphill(objective, mean, step, psi)
        gained, psi = better - psi, max(better, psi)
        if gained < 1e-12:
            break
    bent = curvature(mean)
    evidence = float(psi - np.log(np.diag(np.linalg.cholesky(bent))).sum())
    covariance = np.asarray(scale * np.linalg.inv(bent), np.float64)
    side = float(mean[columns] * d[0, columns]) if d.shape[1] > columns else 0.0
    return Posterior(mean[:columns], covariance[:columns, :columns], float(a), evidence, d @ mean, side)


def _uphill(objective: Callable[[Array], float], at: Array, step: Array, value: float) -> tuple[Array, float]:
    """Where a step leads, and the objective there: halved until it is no lower, as some part of the step is where the
    objective is concave."""
    size, better = 1.0, value
    while size > 1e-10:
        better = objective(at + size * step)
        if better >= value:
            break
        size /= 2
    return at + size * step, better


def _psi(alpha: Array, f: Array, y: Array, c: Array) -> float:
    return float(-(c * (y * np.logaddexp(0, -f) + (1 - y) * np.logaddexp(0, f))).sum() - f @ alpha / 2)


def _solve(factor: Array, b: Array) -> Array:
    return np.linalg.solve(factor.T, np.linalg.solve(factor, b))


def pair_of_votes(differences: Array) -> Numbers:
    """Which pair each vote is about, (n,), 0 the first: votes on the same two pictures have the same differences
    (n, D), or the opposite ones where the sides were exchanged."""
    d = np.asarray(differences, np.float64)
    if not d.size:
        return np.arange(len(d))
    leading = np.take_along_axis(d, (d != 0).argmax(1)[:, None], 1)
    _, begins, pairs = np.unique(np.where(leading < 0, -d, d) + 0.0, axis=0, return_index=True, return_inverse=True)
    return begins.argsort().argsort()[pairs.reshape(-1)]


def leave_one_out(
    differences: Array, outcomes: Array, weights: Array | None = None, pairs: Numbers | None = None, **options: object
) -> Array:
    """P(left is better) of each vote, (n,), by the posterior of all votes on other pairs: exact refits at the prior
    chosen on all of them. `pairs`: which pair each is about; None = `pair_of_votes`. Of more than MANY pairs those of
    one of MANY parts are left out together. The side's constant is not part of the prediction: it says nothing about
    the pictures."""
    d, y = np.asarray(differences, np.float64), np.asarray(outcomes, np.float64)
    places = pair_of_votes(d) if pairs is None else pairs
    c = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    side_std = float(options.get("side_std", 0.0))  # type: ignore[arg-type]
    prior = fit(d, y, c, **options).prior  # type: ignore[arg-type]
    found = np.full(len(y), 0.5)
    for part in range(min(len(y), MANY)):
        out = places % MANY == part
        if not out.any():
            break
        if not out.all():
            found[out] = fit(d[~out], y[~out], c[~out], priors=(prior,), side_std=side_std).probability(d[out])
    return found


def rater_qualities(
    differences: Array, outcomes: Array, raters: Sequence[str], *, rounds: int = 3, side_std: float = 0.0
) -> dict[str, float]:
    """A quality for each rater, from 0 (votes at random) to 1: their votes follow s(quality x difference).

    Coordinate ascent on the log evidence over a grid, which punishes a quality that the votes do not bear out. One
    rater has quality 1, whom the prior already scales.
    """
    names = list(dict.fromkeys(raters))
    quality = dict.fromkeys(names, 1.0)
    if len(names) < 2:
        return quality
    rows = np.array([names.index(name) for name in raters])
    for _ in range(rounds):
        before = dict(quality)
        for name in names:

            def evidence(q: float, name: str = name) -> float:
                scales = np.array([(quality | {name: q})[n] for n in names])[rows]
                return fit(differences * scales[:, None], outcomes, side_std=side_std).log_evidence

            quality[name] = max((1.0, 0.5, 0.25, 0.0), key=evidence)
        if quality == before:
            break
    top = max(quality.values()) or 1.0
    return {name: q / top for name, q in quality.items()}
