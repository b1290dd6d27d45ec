"""Where proposals come from: the policy, its most probable rationale, or a guide."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from stochgrad.core import PRNGKey
from stochgrad.em._model import Guide, LatentModel, Questions, Rationales

LogWeight = Callable[[Any, Any, Questions, Any, Array, Array, Array | None], Array]


class ProposalKind(NamedTuple):
    r"""A distribution q of proposals, and their weight $w(z) = p_\theta(z, y\mid x)/q(z)$.

    Attributes:
        sample: ``(theta, phi, key, questions) -> Rationales``.
        log_weight: ``(theta, phi, questions, tokens, mask, log_likelihood, log_q) -> log w``, where
            a ``log_q`` of None is evaluated.
        log_prob: ``(phi, questions, tokens, mask) -> log q``, if q learns; None otherwise.
    """

    sample: Callable[[Any, Any, PRNGKey, Questions], Rationales]
    log_weight: LogWeight
    log_prob: Callable[[Any, Questions, Any, Array], Float[Array, " n"]] | None = None

    def split(self, position: Any) -> tuple[Any, Any]:
        """The model's parameters, and those that a guide is called with."""
        return (position, position) if self.log_prob is None else position


def proposal_kind(model: LatentModel, guide: Guide | None, greedy: bool) -> ProposalKind:
    """Proposals of a guide; without one of the policy, or of its most probable rationales."""
    if guide is not None:
        return _of_guide(model, guide)
    policy = model.policy

    def sample(theta, phi, key, rows):
        return (
            policy.greedy(theta, rows.prompts)
            if greedy
            else policy.sample(theta, key, rows.prompts)
        )

    def log_weight(theta, phi, rows, tokens, mask, log_likelihood, log_q):
        return log_likelihood  # the policy is the prior, which cancels

    return ProposalKind(sample, log_weight)


def _of_guide(model: LatentModel, guide: Guide) -> ProposalKind:
    def sample(theta, phi, key, rows):
        return guide.policy.sample(phi, key, rows.hints)

    def log_prob(phi, rows, tokens, mask):
        return guide.policy.log_prob(phi, rows.hints, tokens, mask)

    def log_weight(theta, phi, rows, tokens, mask, log_likelihood, log_q):
        if log_q is None:
            log_q = log_prob(phi, rows, tokens, mask)
        return model.policy.log_prob(theta, rows.prompts, tokens, mask) + log_likelihood - log_q

    return ProposalKind(sample, log_weight, log_prob if guide.learned else None)
