"""The loss against values computed by hand."""

import math

import pytest
import torch

from dpo_tutorial.training import dpo


def test_log_probs_are_summed_over_the_answer_only():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]]))
    ids = torch.tensor([[0, 1, 2]])
    every = dpo.token_log_probs(logits, ids)
    assert every.tolist()[0] == pytest.approx([math.log(0.25), math.log(0.1)])
    only_last = dpo.sequence_log_prob(logits, ids, torch.tensor([[0, 0, 1]]))
    assert only_last.item() == pytest.approx(math.log(0.1))


def test_padding_does_not_count():
    torch.manual_seed(0)
    logits, ids = torch.randn(1, 6, 11), torch.randint(0, 11, (1, 6))
    mask = torch.tensor([[0, 0, 1, 1, 0, 0]])
    short = dpo.sequence_log_prob(logits[:, :4], ids[:, :4], mask[:, :4])
    assert torch.allclose(dpo.sequence_log_prob(logits, ids, mask), short)


def test_loss_by_hand():
    # margin = 0.1 * ((-10 + 12) - (-20 + 15)) = 0.7
    loss, margin = dpo.dpo_loss(*(torch.tensor([v]) for v in (-10.0, -20.0, -12.0, -15.0)), beta=0.1)
    assert margin.item() == pytest.approx(0.7)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.7)))


def test_equal_policy_and_reference_give_ln_2_for_any_beta():
    a, b = torch.tensor([-5.0, -9.0]), torch.tensor([-7.0, -1.0])
    for beta in (0.01, 0.1, 5.0):
        assert dpo.dpo_loss(a, b, a, b, beta)[0].item() == pytest.approx(math.log(2))


def test_swapping_a_pair_mirrors_the_margin():
    values = [torch.tensor([v]) for v in (-10.0, -20.0, -12.0, -15.0)]
    forward = dpo.dpo_loss(*values, beta=0.3)[1]
    swapped = dpo.dpo_loss(values[1], values[0], values[3], values[2], beta=0.3)[1]
    assert torch.allclose(forward, -swapped)


def test_gradient_weight_is_the_derivative_of_the_loss():
    margin = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    torch.nn.functional.logsigmoid(margin).sum().backward()
    assert torch.allclose(margin.grad, dpo.gradient_weight(margin.detach()))


def test_a_higher_beta_stays_closer_to_the_reference():
    """Of pairs whose label is right 9 times in 10 the loss is least where the log-ratios are log(9)/beta apart."""

    def apart(beta):
        zero, ratio = torch.zeros(1), torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.LBFGS([ratio], max_iter=200, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            right, wrong = (
                dpo.dpo_loss(ratio, zero, zero, zero, beta)[0],
                dpo.dpo_loss(zero, ratio, zero, zero, beta)[0],
            )
            value = 0.9 * right + 0.1 * wrong
            value.backward()
            return value

        optimizer.step(loss)
        return ratio.item()

    found = [apart(beta) for beta in (0.1, 0.3, 1.0)]
    assert found == pytest.approx([math.log(9) / beta for beta in (0.1, 0.3, 1.0)], rel=1e-2)
    assert found[0] > found[1] > found[2]
