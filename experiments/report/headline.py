"""Sums up a question's results in a sentence or two, for the head of the report and the end of a command."""

from __future__ import annotations

from collections import Counter

from experiments.report import charts
from experiments.results import Made, Results
from experiments.verdicts import effect_words, evidence_words


def lead(results: Results) -> str:
    """The most telling sentences: which arm survives what, what broke, how much is decided."""
    decided = sum(verdict.judgement != "undecided" for verdict in results.verdicts)
    said = list(filter(None, [telling_sentence(results)]))
    if cause := cause_sentence(results):
        said.append(cause)
    if results.verdicts:
        many = f"Of {len(results.verdicts)} claims {decided} {'is' if decided == 1 else 'are'} decided."
        one = f"The claim is {results.verdicts[0].judgement}."
        said.append(one if len(results.verdicts) == 1 else many)
    return " ".join(said)


def telling_sentence(results: Results) -> str:
    """The rate at which the arms differ most, and which survive it; without rates, the claim with the most evidence.

    "At a learning rate of 0.25 deepnorm-bf16 survives ...", or "The most evidence (e = 280) is for: ...".
    """
    rate = charts.telling_rate(results)
    if rate is None:
        return _most_evidence(results)
    shares = {arm: by_rate[rate] for arm, by_rate in results.alive.items() if rate in by_rate}
    best = max(shares.values(), key=lambda share: share[0] / share[1])
    worst = min(shares.values(), key=lambda share: share[0] / share[1])
    at = f"At a learning rate of {charts.rate_words(rate)}"
    if best[0] / best[1] == worst[0] / worst[1]:
        return f"{at} every arm survives in {best[0]} of {best[1]} seeds."
    tops = [arm for arm, share in shares.items() if share == best]
    lows = [arm for arm, share in shares.items() if share == worst]
    return (
        f"{at} {_and(tops)} {'survives' if len(tops) == 1 else 'survive'} in {best[0]} of {best[1]} seeds, "
        f"{_and(lows)} in {worst[0]} of {worst[1]}."
    )


def _most_evidence(results: Results) -> str:
    decided = [one for one in results.verdicts if one.judgement in ("supported", "against")]
    if not decided:
        return ""
    most = max(decided, key=lambda one: one.decision.e_value)
    side = "for" if most.judgement == "supported" else "against"
    effect = effect_words(most, results.outcomes[most.claim.metric])
    return f"The most evidence (e = {evidence_words(most.decision.e_value)}) is {side}: {most.claim.text}, {effect}."


def cause_sentence(results: Results) -> str:
    """What broke most often, and where: "Of 50 runs that broke, 48 began with an overflow of the number format, 30 of them ..."."""
    broken = results.broken
    found = [cause for made in broken if (cause := cause_of(made)) is not None]
    if not found:
        return ""
    (what, count), *_ = Counter(what for what, _ in found).most_common(1)
    (where, often), *_ = Counter(site for one, site in found if one == what).most_common(1)
    at = f", {'all' if often == count else often} of them in {where}" if where else ""
    of = (
        f"All {count} runs that broke"
        if count == len(broken)
        else f"Of {len(broken)} runs that broke, {count}"
    )
    return f"{of} began with {what}{at}."


def cause_of(made: Made) -> tuple[str, str] | None:
    """The first suspect of a broken run, in words, and its site, as the run recorded them; None where it did not."""
    for event in made.run.events:
        if event.kind == "diagnosis":
            said = " ".join(map(str, event.data.get("sentences", ())))
            suspect = said.partition("First suspect: ")[2].partition(". ")[0].removesuffix(".")
            site = str(event.data.get("site") or "")
            return (suspect or str(event.data.get("cause", ""))).removesuffix(f", {site}"), site
    return None


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
