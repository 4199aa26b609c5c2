"""Pairwise votes to strengths: Bradley-Terry with ties as half wins, Elo replayed in order, win shares."""

from __future__ import annotations

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.sparse.csgraph

from keysync_jax.core.errors import KeySyncError

SCALE = 400.0 / np.log(10.0)  # Elo points per unit of log odds
START = 1000.0


def wins(a: np.ndarray, b: np.ndarray, winner: np.ndarray, count: int, weights: np.ndarray | None = None, tie: float = 0.5) -> np.ndarray:
    """`[M, M]`, row beat column so often; a tie counts `tie` for both. `winner` is 0 for `a`, 1 for `b`, 2 for a tie."""
    table = np.zeros((count, count))
    weights = np.ones(len(a)) if weights is None else np.asarray(weights, np.float64)
    np.add.at(table, (a, b), weights * np.choose(winner, [1.0, 0.0, tie]))
    np.add.at(table, (b, a), weights * np.choose(winner, [0.0, 1.0, tie]))
    return table


def win_share(a: np.ndarray, b: np.ndarray, winner: np.ndarray, count: int) -> np.ndarray:
    """`[M, M]` wins of row over column as a share of their games (a tie is a game without a win); -1 where they never met."""
    games = wins(a, b, np.full(len(a), 2), count, tie=1.0)
    return np.divide(wins(a, b, winner, count, tie=0.0), games, out=np.full((count, count), -1.0), where=games > 0)


def elo(a: np.ndarray, b: np.ndarray, winner: np.ndarray, count: int, k: float = 4.0) -> np.ndarray:
    """`[M]` ratings after replaying the votes in order from 1000 (FastChat's `compute_elo`). The order matters."""
    rating = np.full(count, START)
    results = np.array([1.0, 0.0, 0.5])[winner]
    for i, j, result in zip(a, b, results, strict=True):
        change = k * (result - 1 / (1 + 10 ** ((rating[j] - rating[i]) / 400)))
        rating[i] += change
        rating[j] -= change
    return rating


def bradley_terry(table: np.ndarray, prior: float = 0.0) -> np.ndarray:
    """`[M]` strengths of greatest likelihood on Elo's scale, mean 1000, from wins `[M, M]`.

    Args:
      table: wins of row over column, ties as halves.
      prior: that many games between every two, half of them won, added first; makes the maximum exist.

    Raises:
      KeySyncError: the maximum does not exist: some group of methods never lost to the others, or never met them.
    """
    table = np.asarray(table, np.float64) + prior / 2 * (1 - np.eye(len(table)))
    groups, label = scipy.sparse.csgraph.connected_components(scipy.sparse.csr_matrix(table > 0), connection="strong")
    if groups > 1:
        alone = np.flatnonzero(label == label[0]).tolist()
        raise KeySyncError(f"no finite strengths: methods {alone} and the others never both won and lost; collect votes or give --prior 1")
    games = table + table.T

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        difference = theta[:, None] - theta[None]
        expected = games / (1 + np.exp(-difference))
        return float((table * np.logaddexp(0, -difference)).sum()), expected.sum(1) - table.sum(1)

    found = scipy.optimize.minimize(loss, np.zeros(len(table)), jac=True, method="BFGS", options={"gtol": 1e-9 * max(games.sum(), 1.0)})
    return START + SCALE * (found.x - found.x.mean())
