"""One paragraph that says what the numbers show, and what they do not."""

from .. import show
from . import stats


def verdict(found: dict) -> list[str]:
    """What changed and what did not, one sentence each, drawn from the numbers of `compare.derive`."""
    held_out, rules, noise = found["held_out"]["after"], found["rules"], found["noise"]
    a, chosen, rejected = held_out["accuracy"], held_out["reward_chosen"], held_out["reward_rejected"]
    span = f"{a['rate']:.2f} (95% interval {a['low']:.2f} to {a['high']:.2f}, {a['n']} pairs)"
    if a["low"] > 0.5:
        said = [f"The policy tells chosen from rejected on held-out pairs: accuracy {span}, against 0.50 before."]
    elif a["high"] < 0.5:
        said = [f"The policy prefers the rejected answers: accuracy {span}. Look for swapped labels."]
    else:
        said = [f"No effect is shown on held-out pairs: accuracy {span} includes 0.50."]
    scores = ", ".join(f"{name} {judge['share']['rate']:.2f}" for name, judge in found["against"].items())
    gaps = {name: judge["difference"] for name, judge in found["against"].items()}
    told = {name: f"{name} ({gap['difference']:+.2f}, {show.span(gap, '+.2f')})" for name, gap in gaps.items()}
    unbeaten = [told[name] for name, gap in gaps.items() if not gap["low"] > 0]
    nearest = told[min(gaps, key=lambda name: gaps[name]["difference"])]
    judged = (
        f"As a judge the policy is not shown to be better than {', '.join(unbeaten)}."
        if unbeaten
        else f"As a judge the policy is better than each of them, and least so than {nearest}."
    )
    said.append(f"Simple judges of the same pairs: {scores}. {judged}")
    within = noise["within"]
    said.append(
        f"Rounding alone moves a margin by {noise['spread']:.2g} (root mean square). The sign of a margin nearer to 0 "
        f"than {noise['floor']:.2g} is not certain: so it is with {within} of {a['n']} margins."
        + (" Judge these pairs in float32 (DTYPE=fp32)." if within > a["n"] / 4 and noise["dtype"] != "fp32" else "")
    )
    rewards = f"chosen {chosen['mean']:+.2f}, rejected {rejected['mean']:+.2f}"
    if chosen["low"] > 0 > rejected["high"]:
        said.append(f"Chosen answers became more likely and rejected ones less: mean rewards {rewards}.")
    elif chosen["high"] < 0 and rejected["high"] < 0:
        said.append(
            f"Both sides became less likely: mean rewards {rewards}. DPO raises the difference, not the chosen answer. "
            "Some fall is usual; a long fall is a sign to stop earlier or raise beta."
        )
    elif chosen["low"] > 0 and rejected["low"] > 0:
        said.append(f"Both sides became more likely: mean rewards {rewards}.")
    else:
        said.append(f"Mean rewards: {rewards}. For at least one of them no change is shown.")
    nats, a_token = found["kl"]["inside"]["per_answer"], found["kl"]["inside"]["per_token"]["mean"]
    said.append(
        f"On answers of its own the policy is {nats['mean']:.1f} nats from the base "
        f"({show.span(nats, '.1f')}), {a_token:.2f} a token."
    )
    lines = {
        name: f"{name} {old['rate']:.0%} → {rules['after'][name]['rate']:.0%}" for name, old in rules["before"].items()
    }
    shifted = [line for name, line in lines.items() if stats.moved(rules["change"][name])]
    still = [line for name, line in lines.items() if not stats.moved(rules["change"][name])]
    n = next(iter(rules["before"].values()))["n"]
    if shifted:
        said.append(f"In {n} generated answers the rate moved beyond chance for: {'; '.join(shifted)}.")
    if stats.moved(found["form"]["change"]["tokens"]):
        old, new = (found["form"][when]["tokens"]["mean"] for when in ("before", "after"))
        said.append(f"Answers became {'shorter' if new < old else 'longer'}: {old:.0f} → {new:.0f} tokens.")
    for name, change in found["same_length"]["change"].items():
        if stats.moved(rules["change"][name]):
            old, new = (found["same_length"][when][name]["rate"] for when in ("before", "after"))
            shown = "it moved too" if stats.moved(change) else "no change is shown"
            said.append(f"At equal length, {shown} for: {name} {old:.0%} → {new:.0%}.")
    if stats.moved(repeat := found["same_form"]["change"]["longest repeat (words)"]):
        said.append(
            f"At equal length the policy repeats itself {'more' if repeat['difference'] > 0 else 'less'}: its longest "
            f"repeat is {repeat['difference']:+.1f} words ({repeat['low']:+.1f} to {repeat['high']:+.1f})."
        )
    said.append(_instructions(found["instructions"]))
    said.append(
        f"Not shown to move with {n} answers: {'; '.join(still)}."
        if still
        else "Every rule that a program can check moved."
    )
    return said


def _instructions(found: dict) -> str:
    n, smallest = found["before"]["n"], found["smallest"]["power_80"]
    counts = (
        f"Of {n} requests that a program can check the base follows {found['before']['rate']:.0%}, the policy "
        f"{found['after']['rate']:.0%} ({found['gained']} gained, {found['lost']} lost)"
    )
    if found["p"] < 0.05:
        return f"{counts}: {'a gain' if found['gained'] > found['lost'] else 'a loss'}, p {found['p']:.2g}."
    could = "too few changed to show anything" if smallest is None else f"it would have found {smallest:.0%} of them"
    return f"{counts}: no change is shown; {could}" + ("." if smallest is None else ", four times in five.")
