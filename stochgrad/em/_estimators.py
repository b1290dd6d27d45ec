r"""Estimators of the M-step's gradient: each is a weight for every latent that a visit has met.

The gradient is $\sum_i w_i\nabla\log p_\theta(z_i\mid x_i)$ over the proposals and the chains of a
minibatch, for all of them; they differ in the weights.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.ops import segment_max, segment_min
from jax.scipy.special import betaln, gammaln
from jaxtyping import Array, Float

from stochgrad.core import check_choice, check_count, check_flag, check_number
from stochgrad.em._minibatch import Minibatch

Weights = tuple[Float[Array, " questions"] | None, Float[Array, " proposals"] | None]


class Estimator(NamedTuple):
    """A rule for the weights.

    Attributes:
        weights: ``minibatch -> (chains, proposals)``; None where a kind has no weight.
        name: Its name.
        chains: Whether it weighs chains.
        control: Whether it takes the policy's own proposals for a control variate.
        greedy: Whether proposals are the policy's most probable rationales.
        directions: Directions along which derivatives are measured; zero for none, None for whole
            gradients (small models only).
        subsample: How many latents to differentiate, drawn by systematic resampling; None for all.
        least: Proposals that each question needs.
        unbounded: Whether rewards may be any finite numbers, instead of likelihoods from 0 to 1.
    """

    weights: Callable[[Minibatch], Weights]
    name: str
    chains: bool = False
    control: bool = False
    greedy: bool = False
    directions: int | None = 0
    subsample: int | None = None
    least: int = 1
    unbounded: bool = False


def trice(
    control_variate: Literal["auto", "leave_one_out", "optimal", "none"] | float = "auto",
    *,
    subsample: int | None = None,
    directions: int | None = 4,
) -> Estimator:
    r"""The gradient of the marginal log-likelihood, from the chains, with a control variate.

    $$\hat g = \frac1n\sum_m \bigl[\nabla\log p_\theta(z_m)
      - k_m\beta_m\nabla\log p_\theta(\tilde z_m)\bigr],$$

    over the n questions whose chain stands at a right latent $z_m$, with the proposals
    $\tilde z_m$, whose score has mean zero, and with $k_m = 1$ where the chain was right before the
    visit, 0 where it was not. The first right proposal of a chain counts in full: that the question
    takes part at all depends on it, so that its score is no control variate
    [Phan et al. 2023, section 3.2, subtract it there too].

    With p the chance of a right proposal, V the posterior variance and S the mean square of
    $\nabla\log p_\theta(\tilde z)$, a question has the variance

    $$V(1 - 2\beta p) + \beta^2S,\qquad \text{least at}\quad \beta^* = \frac{pV}S,$$

    with the mean of K proposals $\beta^* = qV/S$, $q = 1 - (1 - p)^K$, and a variance above V where
    $\beta > 2\beta^*$. ``"auto"`` estimates $\beta^*$ for each question, from its past visits
    alone, so that the mean is exact: q is the share of visits that moved its chain, and V / S is
    what it would be with a parameter for each rationale and no wrong one drawn twice,
    $D / (1 - p^2(1 - D))$, where D is the share of the moves that changed the rationale. A question
    with a single right rationale, V = 0, has D = 0 and no control variate; one that a learned model
    answers in many ways has $\beta\to 1$, and its variance goes to zero.

    ``"leave_one_out"``, the paper's choice, is the share of the proposals that were taken, of the
    other questions whose chain was right before. It raises the variance of hard questions among
    easy ones, and of those with a single right rationale. ``"optimal"`` measures gradients: where a
    chain moves from one posterior draw $z_l$ to the next, $\tilde z_l$, half the squared distance
    of their gradients has mean $V_l$, so that one coefficient for all is

    $$\hat\beta_m = \frac{\sum_{l\ne m}\frac12[\text{l moved}]\,
      \|\nabla\log p(z_l) - \nabla\log p(\tilde z_l)\|^2}
      {\sum_{l\ne m}\|\nabla\log p(\tilde z_l)\|^2},$$

    with l over the chains that were right before.

    Args:
        control_variate: As above; ``"none"``; or a number for $\beta$.
        subsample: How many of the latents to differentiate: drawn by systematic resampling in
            proportion to the size of their weights, with their signs. As the model learns, the
            weights shrink and fewer will do.
        directions: For ``"optimal"``: random directions, or None for whole gradients.

    Raises:
        ValueError: the control variate is unknown.
    """
    if isinstance(control_variate, str):
        kinds = ("auto", "leave_one_out", "optimal", "none")
        check_choice("control_variate", control_variate, kinds)
    else:
        control_variate = check_number("control_variate", control_variate, zero=True)
    if subsample is not None:
        subsample = check_count("subsample", subsample)
    directions = _checked(directions)

    def coefficients(batch: Minibatch):
        """Of chains that were right before the visit."""
        before = batch.had_valid_latent
        if control_variate == "auto":
            assert batch.history is not None
            return before * batch.history.coefficient(batch.counts())
        if control_variate == "leave_one_out":
            taken = batch.sums(batch.accept * batch.unbiased_mask)
            rate = before * taken / jnp.maximum(batch.counts(), 1.0)
            others = jnp.sum(before) - before
            return before * (jnp.sum(rate) - rate) / jnp.maximum(others, 1.0)
        if control_variate == "optimal":
            proposals, chains = batch.slopes()
            mean = batch.sums(proposals * batch.shares()[:, None])
            moves = before * (batch.proposal_index >= 0).astype(before.dtype)
            apart = chains - proposals[jnp.maximum(batch.proposal_index, 0)]
            each = jnp.maximum(batch.counts(), 1.0)
            covariance = 0.5 * moves * jnp.sum(apart**2, axis=1) / each
            square = before * jnp.sum(mean**2, axis=1)
            over, under = (jnp.sum(x) - x for x in (covariance, square))
            return before * jnp.clip(over / jnp.where(under > 0, under, 1.0), 0.0, 1.0)
        return before * float(control_variate)

    def weights(batch: Minibatch):
        valid = batch.has_valid_latent
        each = valid / jnp.maximum(jnp.sum(valid), 1.0)
        if control_variate == "none":
            return each, None
        beta = lax.stop_gradient(coefficients(batch))
        return each, -(each * beta)[batch.owner] * batch.shares()

    directions = directions if control_variate == "optimal" else 0
    control = control_variate != "none"
    return Estimator(weights, "trice", True, control, directions=directions, subsample=subsample)


def star(greedy: bool = False) -> Estimator:
    r"""Likelihood of the proposals that were right, all alike [STaR, Zelikman et al. 2022].

    $$\hat g = \frac{\sum_i c_i\nabla\log p_\theta(z_i)}{\sum_i c_i}
      \quad\propto\quad \sum_n p_n\nabla\log p_n \text{ on average:}$$

    a question counts in proportion to how often it is solved already. To start each round from the
    base model, or to add rationales from a hinted prompt, is up to the caller.

    Args:
        greedy: Whether proposals are the policy's most probable rationales.
    """
    check_flag("greedy", greedy)

    def weights(batch: Minibatch):
        valid = batch.reward * batch.unbiased_mask
        return None, valid / jnp.maximum(jnp.sum(valid), 1e-12)

    return Estimator(weights, "star", greedy=greedy)


def raft(kept: Literal["one", "all"] = "one") -> Estimator:
    r"""Likelihood of accepted proposals, every solved question alike.

    $$\hat g = \frac1{\#\text{solved}}\sum_{m\text{ solved}}\nabla\log p_\theta(z_m),\qquad
      \propto \sum_n\bigl(1 - (1 - p_n)^K\bigr)\nabla\log p_n$$

    on average with K proposals a question [Dong et al. 2023].

    Args:
        kept: ``"one"``, the first accepted of each question, or ``"all"``, the mean over them, as
            the M-step of GVM-RAFT does.
    """
    check_choice("kept", kept, ("one", "all"))

    def weights(batch: Minibatch):
        valid = _valid(batch)
        if kept == "one":
            valid = jnp.where(_rank(valid, batch) <= 1, valid, 0.0)
        count = batch.sums(valid)
        solved = jnp.maximum(jnp.sum(jnp.minimum(count, 1.0)), 1.0)
        return None, valid / jnp.maximum(count, 1.0)[batch.owner] / solved

    return Estimator(weights, "raft")


def rest_em(most: int = 10) -> Estimator:
    r"""Likelihood of accepted proposals, at most so many a question [ReST-EM, Singh et al. 2023].

    Args:
        most: The most proposals that one question contributes; they count alike.
    """
    most = check_count("most", most)

    def weights(batch: Minibatch):
        valid = _valid(batch)
        valid = jnp.where(_rank(valid, batch) <= most, valid, 0.0)
        return None, valid / jnp.maximum(jnp.sum(valid), 1.0)

    return Estimator(weights, "rest_em")


def reinforce(
    baseline: Literal["leave_one_out", "optimal", "none"] = "leave_one_out",
    *,
    directions: int | None = 4,
) -> Estimator:
    r"""The gradient of the mean reward, $\sum_n\nabla p_n$, with a baseline.

    $$\hat g = \frac1M\sum_m\frac1{K_m}\sum_k(c_{mk} - b_{mk})\nabla\log p_\theta(z_{mk}).$$

    Rewards c may be any finite numbers.

    Args:
        baseline: ``"leave_one_out"``, the mean of the question's other proposals
            [Kool et al. 2019]; ``"optimal"``, their mean weighted by squared gradient norms, which
            has the least variance; ``"none"``.
        directions: For ``"optimal"``: random directions, or None for whole gradients.
    """
    check_choice("baseline", baseline, ("leave_one_out", "optimal", "none"))
    directions = _checked(directions)

    def weights(batch: Minibatch):
        reward, mask = batch.reward, batch.unbiased_mask
        size = mask
        if baseline == "optimal":
            size = mask * jnp.sum(batch.slopes()[0] ** 2, axis=1)
        if baseline == "none":
            return None, _mean_over_questions(reward, batch)
        over = batch.sums(reward * size)[batch.owner] - reward * size
        under = batch.sums(size)[batch.owner] - size
        advantage = reward - over / jnp.where(under > 0, under, 1.0)
        advantage = jnp.where(under > 0, advantage, 0.0)
        return None, _mean_over_questions(advantage, batch)

    directions = directions if baseline == "optimal" else 0
    least = 1 + (baseline != "none")
    return Estimator(weights, "reinforce", directions=directions, least=least, unbounded=True)


def grpo(epsilon: float = 1e-4) -> Estimator:
    r"""Rewards standardized within a question, on policy [GRPO, Shao et al. 2024].

    $$A_{mk} = \frac{r_{mk} - \bar r_m}{\sigma_m + \epsilon}.$$

    A question whose proposals are all right, or all wrong, has no gradient. Rewards may be any
    finite numbers.

    Args:
        epsilon: Keeps the quotient finite.
    """
    epsilon = check_number("epsilon", epsilon)

    def weights(batch: Minibatch):
        # from the least of a question's rewards, and by the largest: equal ones give zero, large
        # ones do not overflow
        mask, owner, questions = batch.unbiased_mask > 0, batch.owner, batch.mask.shape[0]
        low = segment_min(jnp.where(mask, batch.reward, jnp.inf), owner, questions)
        above = jnp.where(mask, batch.reward - low[owner], 0.0)
        high = segment_max(above, owner, questions)
        scale = jnp.where((high > 0) & jnp.isfinite(high), high, 1.0)
        batch = batch._replace(reward=above / scale[owner])
        mean, variance = _moments(batch)
        deviation = jnp.sqrt(variance) + epsilon / scale
        return None, _mean_over_questions((batch.reward - mean[owner]) / deviation[owner], batch)

    return Estimator(weights, "grpo", least=2, unbounded=True)


def bnpo() -> Estimator:
    r"""Rewards less their question's mean, over a Beta density fitted to the questions' means.

    $$A = \frac{r - \hat p}{f(\hat p;\ \alpha, \beta)},\quad
      \alpha = \max(1, 1 + a/3),\ \beta = \max(1, 1 + b/3),\quad
      a = \Bigl(\frac{m(1-m)}v - 1\Bigr)m,\ b = \Bigl(\frac{m(1-m)}v - 1\Bigr)(1-m),$$

    where m and v are the mean and the variance of $\hat p$ over the minibatch. With
    $\alpha = \beta = 1$ it is ``reinforce`` with a mean baseline; with 3/2, in proportion to
    ``grpo`` [BNPO, Xiao et al. 2025; not TRL's loss of that name]. Rewards are from 0 to 1, where
    a Beta density is.
    """

    def weights(batch: Minibatch):
        mean, _ = _moments(batch)
        mask = batch.mask * jnp.minimum(batch.counts(), 1.0)
        count = jnp.maximum(jnp.sum(mask), 1.0)
        m = jnp.sum(mean * mask) / count
        v = jnp.sum((mean - m) ** 2 * mask) / jnp.maximum(count - 1.0, 1.0)
        odds = jnp.maximum(m * (1 - m) / jnp.where(v > 0, v, 1.0) - 1.0, 0.0)
        odds = jnp.where(v > 0, odds, 0.0)
        alpha = jnp.maximum(1.0, 1.0 + odds * m / 3.0)
        beta = jnp.maximum(1.0, 1.0 + odds * (1 - m) / 3.0)
        inside = jnp.clip(mean, 1e-6, 1 - 1e-6)
        log_density = (
            (alpha - 1) * jnp.log(inside) + (beta - 1) * jnp.log1p(-inside) - betaln(alpha, beta)
        )
        scale = jnp.minimum(jnp.exp(-log_density), 1e6)
        return None, _mean_over_questions(
            (batch.reward - mean[batch.owner]) * scale[batch.owner], batch
        )

    return Estimator(weights, "bnpo", least=2)


def maxk(k: int) -> Estimator:
    r"""The gradient of the expected best of k proposals, without bias.

    With rewards in rising order, $r_{(1)}\le\dots\le r_{(n)}$, the proposal of rank i weighs

    $$s_i = \binom nk^{-1}\Bigl[\binom{i-1}{k-1}r_{(i)} + \sum_{j>i}\binom{j-2}{k-2}r_{(j)}\Bigr]$$

    [max@k, Bagirov et al. 2025]. With a verifier it is the gradient of pass@k.
    Rewards may be any finite numbers.

    Args:
        k: Of how many the best counts; a question needs at least as many proposals.
    """
    k = check_count("k", k)

    def weights(batch: Minibatch):
        reward, mask = batch.reward, batch.unbiased_mask
        count = batch.counts()[batch.owner]
        key = jnp.where(mask > 0, reward, -jnp.inf)
        order = jnp.lexsort((key, batch.owner))
        sorted_owner = batch.owner[order]
        invalid = batch.sums(1.0 - mask)[sorted_owner]
        first = jnp.searchsorted(sorted_owner, jnp.arange(batch.mask.shape[0]))
        place = (jnp.arange(order.shape[0]) - first[sorted_owner] + 1).astype(invalid.dtype)
        place = place - invalid
        r = jnp.where(place >= 1, reward[order], 0.0)
        n = count[order]
        own = r * _choose_ratio(place - 1, k - 1, n, k)
        later = r * _choose_ratio(place - 2, k - 2, n, k) if k > 1 else jnp.zeros_like(r)
        total = batch.sums(later[jnp.argsort(order)])[sorted_owner]
        running = jnp.cumsum(later)
        before = running - later
        start = before[jnp.minimum(first, order.shape[0] - 1)][sorted_owner]
        after = total - (running - start)
        s = jnp.where(place >= 1, own + after, 0.0)[jnp.argsort(order)]
        return None, mask * s / jnp.maximum(jnp.sum(batch.mask), 1.0)

    return Estimator(weights, "maxk", least=k, unbounded=True)


def _checked(directions: int | None) -> int | None:
    return None if directions is None else check_count("directions", directions)


def _valid(batch: Minibatch):
    return batch.unbiased_mask * (batch.reward > 0).astype(batch.unbiased_mask.dtype)


def _rank(valid, batch: Minibatch):
    """Rank of each proposal among its question's valid ones, in the order of drawing."""
    same = batch.owner[:, None] == batch.owner[None, :]
    earlier = jnp.tril(same).astype(valid.dtype)
    return earlier @ valid


def _moments(batch: Minibatch):
    """Mean and variance of each question's rewards."""
    shares = batch.shares()
    mean = batch.sums(batch.reward * shares)
    return mean, batch.sums((batch.reward - mean[batch.owner]) ** 2 * shares)


def _mean_over_questions(advantage, batch: Minibatch):
    """Advantages over the number of a question's proposals, and over that of questions."""
    return advantage * batch.shares() / jnp.maximum(jnp.sum(batch.mask), 1.0)


def _choose_ratio(a, b: int, n, k: int):
    """``C(a, b) / C(n, k)``, zero where a < b."""
    if b < 0:
        return jnp.zeros_like(a)
    ok = (a >= b) & (n >= k)
    a, n = jnp.where(ok, a, b), jnp.where(ok, n, k)

    def log_choose(n, k):
        return gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)

    return jnp.where(ok, jnp.exp(log_choose(a, b) - log_choose(n, k)), 0.0)
