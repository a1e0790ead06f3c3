"""Linear models of shallow states: what a state says of its token before anything is tried out.

Both are Gaussian: a token's states scatter around a centre, by the context, with a covariance that all tokens share.
Then the nearest centre in the metric of that covariance is the likeliest token (linear discriminant analysis, Fisher
1936; as a probe of hidden states: Alain and Bengio, arXiv 1610.01644). Closed form, so that figures are repeatable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SHRINKAGE = 0.01
"""Of the covariance towards its diagonal."""


@dataclass(frozen=True)
class StateModel:
    """Centres of all tokens from their embeddings: the attacker has the weights."""

    metric: torch.Tensor
    """[hidden_size, hidden_size]: states times this have uncorrelated scatter of size 1."""
    centres: torch.Tensor
    """[vocabulary, hidden_size], in that metric."""
    half_norms: torch.Tensor
    """[vocabulary]: half the squared length of each centre."""

    @classmethod
    def fit(cls, embeddings: torch.Tensor, ids: torch.Tensor, states: torch.Tensor) -> StateModel:
        """Least squares from embeddings to states.

        Args:
            embeddings: of the vocabulary, float32 [vocabulary, hidden_size].
            ids: int64 [n], n well above hidden_size.
            states: of these tokens in any contexts, float32 [n, hidden_size].
        """
        inputs = _with_one(embeddings)
        chosen = inputs[ids]
        gram = chosen.T @ chosen
        gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
        weights = torch.linalg.solve(gram, chosen.T @ states)
        metric = _metric(states - chosen @ weights, states)
        centres = inputs @ (weights @ metric)
        return cls(metric, centres, centres.square().sum(-1) / 2)

    def ranked(self, states: torch.Tensor, count: int) -> torch.Tensor:
        """Ids int64 [n, count] of the likeliest tokens of states float32 [n, hidden_size], likeliest first."""
        scores = states @ self.metric @ self.centres.T - self.half_norms
        return scores.topk(min(count, scores.shape[1]), dim=-1).indices


@dataclass(frozen=True)
class Probe:
    """Centres of the tokens that were seen, from pairs (token, state) alone: the attacker has a device, no weights."""

    ids: torch.Tensor
    """int64 [seen]."""
    metric: torch.Tensor
    centres: torch.Tensor
    counts: torch.Tensor
    """float32 [seen]: pairs of each token."""

    @classmethod
    def fit(cls, ids: torch.Tensor, states: torch.Tensor) -> Probe:
        """Means and a shared covariance of pairs: ids int64 [n], states float32 [n, hidden_size], n >= 1."""
        seen, which = torch.unique(ids, return_inverse=True)
        counts = torch.bincount(which).float()
        means = torch.zeros(len(seen), states.shape[1]).index_add_(0, which, states) / counts[:, None]
        metric = _metric(states - means[which], states)
        return cls(seen, metric, means @ metric, counts)

    def guess(self, states: torch.Tensor) -> torch.Tensor:
        """The likeliest token int64 [n] of each state float32 [n, hidden_size], among those seen.

        A mean of k pairs is itself off by 1/k of the scatter, which the predictive density takes into account.
        """
        dimensions = states.shape[1]
        spread = 1 + 1 / self.counts
        squares = torch.cdist(states @ self.metric, self.centres).square()
        scores = self.counts.log() - squares / (2 * spread) - dimensions / 2 * spread.log()
        return self.ids[scores.argmax(-1)]


def _with_one(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)


def _metric(scatter: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The inverse root of the covariance of `scatter` [n, d], kept away from 0 by the states' own covariance."""
    dimensions = states.shape[1]
    covariance = scatter.T @ scatter / len(scatter)
    own = states.var(dim=0, correction=0)
    diagonal = covariance.diagonal().clone()
    floor = 1e-6 * own.mean().clamp(min=1e-6)  # states that are all the same have no scatter at all
    covariance += torch.diag(SHRINKAGE * (diagonal + own)) + floor * torch.eye(dimensions)
    # torch's triangular factor L of the inverse: |L^T x|^2 = x^T covariance^-1 x.
    root: torch.Tensor = torch.linalg.cholesky(torch.linalg.inv(covariance.double()))
    return root.float()
