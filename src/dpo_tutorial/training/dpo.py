"""The DPO loss in plain torch (Rafailov et al. 2023, "Direct Preference Optimization", eq. 7)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_log_probs(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Log-probability of each token given the ones before it.

    Args:
        logits: `[batch, length, vocabulary]`; position t predicts token t + 1.
        input_ids: `[batch, length]`.

    Returns:
        `[batch, length - 1]`, in nats; entry t belongs to token t + 1.
    """
    log_probs = F.log_softmax(logits[:, :-1].float(), dim=-1)
    return log_probs.gather(-1, input_ids[:, 1:, None]).squeeze(-1)


def sequence_log_prob(logits: Tensor, input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """log π(y|x): the sum (not the mean) of log-probabilities over the tokens of the answer.

    Args:
        completion_mask: `[batch, length]`, 1 on tokens of the answer, 0 on prompt and padding.

    Returns:
        `[batch]`, in nats.
    """
    return (token_log_probs(logits, input_ids) * completion_mask[:, 1:]).sum(dim=-1)


def implicit_reward(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """r(x, y) = β (log π(y|x) − log π_ref(y|x)), up to a term of the prompt alone that cancels in a pair (eq. 5)."""
    return beta * (policy - reference)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """−log σ(r(chosen) − r(rejected)), averaged over the batch (eq. 7).

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: `[batch]`, log π(y|x) in nats.
        beta: strength of the pull towards the reference; a higher value keeps the policy closer to it.

    Returns:
        (scalar loss, `[batch]` margin r(chosen) − r(rejected)).
    """
    chosen = implicit_reward(policy_chosen, reference_chosen, beta)
    rejected = implicit_reward(policy_rejected, reference_rejected, beta)
    margin = chosen - rejected
    return -F.logsigmoid(margin).mean(), margin


def gradient_weight(margin: Tensor) -> Tensor:
    """σ(−margin): how hard one pair pulls. Near 1 while the order is wrong, ½ at a tie, near 0 once it is learnt.

    It is the factor in front of the gradient of eq. 7 (section 4, "What does the DPO update do?").
    """
    return torch.sigmoid(-margin)
