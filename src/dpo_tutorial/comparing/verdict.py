"""One paragraph that says what the numbers show, and what they do not."""

from __future__ import annotations

from .. import show
from . import stats

# --- in words -----------------------------------------------------------------------------------------------------


def verdict(
    held_out: dict,
    rules: dict[str, dict],
    noise: dict | None = None,
    words: dict | None = None,
    kl: dict | None = None,
    form: dict[str, dict] | None = None,
    same_length: dict[str, dict] | None = None,
    same_form: dict[str, dict] | None = None,
) -> list[str]:
    """What changed and what did not, one sentence each, drawn from the numbers; nothing of what was not measured.

    Args:
        held_out: as `summarise`; rules: as `rules`; noise: as `scoring.noise_floor`; form: as `form`.
        words: `words`, the bag of words' accuracy as `rate`, and `difference`, policy minus that, paired.
        kl: as `generation.kl_from_reference`.
        same_length, same_form: as `rules` and `form`, of the answers that `equal_length` gives.
    """
    a, chosen, rejected = held_out["accuracy"], held_out["reward_chosen"]["mean"], held_out["reward_rejected"]["mean"]
    span = f"{a['rate']:.2f} (95% interval {a['low']:.2f} to {a['high']:.2f}, {a['n']} pairs)"
    if a["low"] > 0.5:
        said = [f"The policy tells chosen from rejected on held-out pairs: accuracy {span}, against 0.50 before."]
    elif a["high"] < 0.5:
        said = [f"The policy prefers the rejected answers: accuracy {span}. Look for swapped labels."]
    else:
        said = [f"No effect is shown on held-out pairs: accuracy {span} includes 0.50."]
    if words:
        gap = words["difference"]
        judged = "does better" if gap["low"] > 0 else "does worse" if gap["high"] < 0 else "shows no advantage"
        said.append(
            f"Word counting scores {words['words']['rate']:.2f} on the same pairs: as a judge the policy {judged} "
            f"({gap['difference']:+.2f}, {show.span(gap, '+.2f')})."
        )
    if noise:
        said.append(
            f"Rounding alone moves a margin by {noise['spread']:.2g} (root mean square). Below {noise['floor']:.2g} "
            f"its sign says nothing: so it is with {noise['within']} of {a['n']} margins."
        )
    if chosen > 0 > rejected:
        said.append(
            f"Chosen answers became more likely (reward {chosen:+.2f}) and rejected ones less ({rejected:+.2f})."
        )
    elif chosen < 0 and rejected < 0:
        said.append(
            f"Both sides became less likely (rewards {chosen:+.2f} and {rejected:+.2f}): DPO raises the difference, "
            "not the chosen answer. Some fall is usual; a long fall is a sign to stop earlier or raise beta."
        )
    else:
        said.append(f"Rewards: chosen {chosen:+.2f}, rejected {rejected:+.2f}.")
    if kl:
        nats = kl["per_answer"]
        said.append(
            f"On answers of its own the policy is {nats['mean']:.1f} nats from the base "
            f"({show.span(nats, '.1f')}), {kl['per_token']['mean']:.2f} a token."
        )
    lines = {
        name: f"{name} {old['rate']:.0%} → {rules['after'][name]['rate']:.0%}" for name, old in rules["before"].items()
    }
    shifted = [line for name, line in lines.items() if stats.moved(rules["change"][name])]
    still = [line for name, line in lines.items() if not stats.moved(rules["change"][name])]
    n = next(iter(rules["before"].values()))["n"]
    if shifted:
        said.append(f"In {n} generated answers the rate moved beyond chance for: {'; '.join(shifted)}.")
    if form and stats.moved(form["change"]["tokens"]):
        old, new = (form[when]["tokens"]["mean"] for when in ("before", "after"))
        said.append(f"Answers became {'shorter' if new < old else 'longer'}: {old:.0f} → {new:.0f} tokens.")
    for name, change in same_length["change"].items() if same_length else ():
        if same_length and stats.moved(rules["change"][name]):
            old, new = (same_length[when][name]["rate"] for when in ("before", "after"))
            shown = "it moved too" if stats.moved(change) else "no change is shown"
            said.append(f"At equal length, {shown} for: {name} {old:.0%} → {new:.0%}.")
    if same_form and stats.moved(repeat := same_form["change"]["longest repeat (words)"]):
        said.append(
            f"At equal length the policy repeats itself {'more' if repeat['difference'] > 0 else 'less'}: its longest "
            f"repeat is {repeat['difference']:+.1f} words ({repeat['low']:+.1f} to {repeat['high']:+.1f})."
        )
    said.append(
        f"Not shown to move with {n} answers: {'; '.join(still)}."
        if still
        else "Every rule that a program can check moved."
    )
    return said
