"""Laws against SciPy and closed forms, verdicts at their level however often one looks, and what a table may hold."""

from __future__ import annotations

import json
import math
from itertools import combinations, permutations

import numpy as np
import pytest
from scipy import integrate, special, stats

from experiments.benchmarks import verdict_error
from experiments.cli import main
from experiments.statistics import decide, holm, median_interval
from experiments.statistics.choice import _plan, looks
from experiments.statistics.orders import HAZARD_RATIOS, log_ratios
from experiments.statistics.proportions import MIXTURE, PairedRates, rejects_half, share_log_e
from experiments.statistics.ranks import RankSum, SignedRanks
from experiments.statistics.stake import FITTING
from experiments.statistics.student import PRIOR_VARIANCE, PairedT, UnpairedT, log_e_value
from experiments.verdicts import Claim, family, judge
from stabilitylab.errors import InputError

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=7), RNG.normal(1.0, size=7)


def test_one_look_is_scipys():
    t = PairedT(A - B).look(0.05, sequential=False)
    theirs = stats.ttest_rel(A, B).confidence_interval(0.95)
    # Two orders of summation of seven numbers: a few units in the last place.
    assert (t.low, t.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    decided = {
        alpha: SignedRanks(A - B).look(alpha, sequential=False).sign != 0
        for alpha in (0.02, 0.05, 0.1, 0.3, 0.9)
    }
    p = float(stats.wilcoxon(A - B, method="exact").pvalue)
    assert decided == {alpha: p <= alpha for alpha in decided}
    p = float(stats.mannwhitneyu(A, B, method="exact").pvalue)
    for alpha in (p * 0.99, p * 1.01):
        assert (RankSum(A, B).look(alpha, sequential=False).sign != 0) == (p <= alpha)
    p = float(stats.binomtest(1, 8).pvalue)
    pairs = np.array([1.0] + [-1.0] * 7 + [0.0] * 5)
    for alpha in (p * 0.99, p * 1.01):
        assert (PairedRates(pairs).look(alpha, sequential=False).sign != 0) == (p <= alpha)


def test_groups_of_other_spread_keep_welchs_error():
    wide = UnpairedT(A, 5 * B).look(0.05, sequential=False)
    error = math.sqrt(np.var(A, ddof=1) / 7 + np.var(5 * B, ddof=1) / 7)
    assert (wide.high - wide.low) / 2 == pytest.approx(stats.t.isf(0.025, 6) * error, rel=1e-9)


def test_the_e_value_of_t_is_the_integral_it_claims_to_be():
    """Marginal likelihood with N(0, g) on the effect over the one without, both as noncentral t densities."""
    n, t = 6, 2.3
    marginal, _ = integrate.quad(
        lambda d: (
            stats.norm.pdf(d, scale=math.sqrt(PRIOR_VARIANCE)) * stats.nct.pdf(t, n - 1, d * math.sqrt(n))
        ),
        -40,
        40,
        points=[0.0, 1.0],
        limit=200,
    )
    assert log_e_value(t, n - 1, n) == pytest.approx(math.log(marginal / stats.t.pdf(t, n - 1)), abs=1e-6)


def test_the_e_value_of_a_share_is_a_beta_mixture():
    k, n = 7, 9
    mixed, _ = integrate.quad(lambda p: stats.beta.pdf(p, MIXTURE, MIXTURE) * p**k * (1 - p) ** (n - k), 0, 1)
    assert share_log_e(k, n) == pytest.approx(math.log(mixed * 2.0**n), abs=1e-5)


def test_orders_have_expectation_one_with_and_without_ties():
    values = np.array([0.0, 1.0, 1.0, 2.0, np.inf])
    ratios = []
    for chosen in combinations(range(5), 2):
        is_arm = np.isin(np.arange(5), chosen)
        ratios.append(np.exp(log_ratios(values, is_arm, HAZARD_RATIOS)))
    assert np.mean(ratios, axis=0) == pytest.approx(np.ones(3), rel=1e-12)
    # A block of ties counts with the mean over its orders.
    is_arm = np.array([True, True, False, False, True])
    broken = []
    for order in permutations((1, 2)):
        place = [0, *order, 3, 4]
        broken.append(np.exp(log_ratios(np.arange(5.0), is_arm[place], HAZARD_RATIOS)))
    assert np.exp(log_ratios(values, is_arm, HAZARD_RATIOS)) == pytest.approx(
        np.mean(broken, axis=0), rel=1e-12
    )


@pytest.mark.parametrize("kind", ["gaussian", "counts", "censored"])
def test_the_rank_sums_two_bets_say_where_its_interval_ends(kind):
    for trial in range(40):
        rng = np.random.default_rng(trial)
        law = RankSum(KINDS[kind](rng, 9), KINDS[kind](rng, 7) + rng.integers(-1, 2))
        seen = law.look(0.2, sequential=True)
        ends = {abs(x) for x in (seen.low, seen.high) if math.isfinite(x)} - {0.0}
        for margin in (0.7, 1.0, 2.0, *ends, *(1.001 * x for x in ends)):
            assert law.inside(margin, 0.2) == (seen.low > -margin, seen.high < margin)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("mix", [(), (2,), (6,)])
def test_a_divided_stake_decides_where_its_interval_leaves_zero(paired, mix):
    for trial in range(40):
        rng = np.random.default_rng(trial)
        a, b = rng.normal(size=9) - 1.5 * (trial % 3), rng.normal(size=9)
        for place in mix:
            b[place] = math.inf
        for runs, stake in looks(a, b, scale="linear", paired=paired):
            seen = stake.look(0.05)
            assert (seen.sign != 0) == (not seen.low <= 0 <= seen.high)
            assert sum(share for _, share in stake.parts) <= 1.0
            for margin in (0.5, 3.0):
                assert stake.within(margin, 0.05) == (seen.low > -margin and seen.high < margin)
            if not np.isfinite(b[:runs]).all():
                assert stake.name in ("signs", "rank sum")
                assert stake.parts[0][1] == (1.0 if mix == (2,) else 1 - FITTING)


def test_a_laws_part_in_the_stake_is_no_bet():
    """Which laws take part is the same with an arm's and a baseline's runs exchanged, pair by pair or all over."""
    for trial in range(60):
        rng = np.random.default_rng(trial)
        a, b = rng.integers(0, rng.integers(2, 40), (2, 4)).astype(float)
        swapped = rng.random(4) < 0.5
        paired = [
            _plan(a, b, "linear", True),
            _plan(np.where(swapped, b, a), np.where(swapped, a, b), "linear", True),
        ]
        values = rng.permutation(np.concatenate([a, b]))
        groups = [_plan(a, b, "linear", False), _plan(values[:4], values[4:], "linear", False)]
        assert paired[0] == paired[1]
        assert groups[0] == groups[1]


def test_holm_is_the_textbooks():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([math.nan, 0.01]) == pytest.approx([1.0, 0.02])


KINDS = {
    "gaussian": lambda rng, n: rng.normal(size=n),
    "heavy": lambda rng, n: rng.standard_t(2, n),
    "skewed": lambda rng, n: np.exp(2 * rng.normal(size=n)),
    "counts": lambda rng, n: rng.poisson(2.0, n).astype(float),
    "censored": lambda rng, n: np.where(rng.random(n) < 0.3, np.inf, rng.normal(size=n)),
    "yes or no": lambda rng, n: (rng.random(n) < 0.4).astype(float),
}
RUNS, TRIALS = 12, 120


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("paired", [True, False])
def test_arms_that_are_alike_are_seldom_told_apart(kind, paired):
    """Stopping at the first look that decides: at most 5 %; with 120 trials, a binomial's 99.9 % quantile is 14."""
    false = 0
    for trial in range(TRIALS):
        rng = np.random.default_rng(trial)
        arm, baseline = KINDS[kind](rng, RUNS), KINDS[kind](rng, RUNS)
        false += decide(arm, baseline, paired=paired).verdict != "undecided"
    assert false <= stats.binom.ppf(0.999, TRIALS, 0.05)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("sequential", [True, False])
def test_the_detectable_effect_is_found_in_four_of_five(paired, sequential):
    """The power said after one data set of 12, on others of the same spread; a fixed end, and stopping only helps."""
    rng, n = np.random.default_rng(1), 12
    a, b = rng.normal(size=n), rng.normal(size=n)
    a, b = (a - a.mean()) / a.std(ddof=1), (b - b.mean()) / b.std(ddof=1)
    if paired:
        d = (a - b) / np.std(a - b, ddof=1) * math.sqrt(2)
        a, b = d, 0 * d + np.linspace(0, 1e-9, n)
    effect = decide(a, b, paired=paired, sequential=sequential).detectable
    found = 0
    for trial in range(150):
        rng = np.random.default_rng(100 + trial)
        x, y = rng.normal(size=n) - effect, rng.normal(size=n)
        found += decide(x, y, paired=paired, sequential=sequential).verdict == "supported"
    assert found >= stats.binom.ppf(0.001, 150, 0.8)


@pytest.mark.parametrize(("n", "either_way"), [(12, 0), (20, 2)])
def test_the_detectable_effect_on_yes_or_no_is_found_in_four_of_five(n, either_way):
    """``either_way`` pairs go each way by chance; the effect turns more of them one way."""
    seen = np.array([1.0] * either_way + [-1.0] * either_way + [0.0] * (n - 2 * either_way))
    effect, noise = PairedRates(seen).detectable(0.05, sequential=True), either_way / n
    assert 0 < effect < 1
    rng = np.random.default_rng(0)
    at_the_end = 0
    for _ in range(300):
        won, lost, _ = rng.multinomial(n, [noise + effect, noise, 1 - 2 * noise - effect])
        at_the_end += rejects_half(int(won), int(won + lost), 0.05, sequential=True) and won > lost
    assert stats.binom.ppf(0.001, 300, 0.8) <= at_the_end <= stats.binom.ppf(0.999, 300, 0.8)
    # Nothing that four pairs can do decides.
    assert PairedRates(np.zeros(4)).detectable(0.05, sequential=True) == math.inf


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([1.0, 1.1, 0.9, 1.05, 0.98, 1.02], [2.0, 2.1, 1.95, 2.02, 2.2, 2.05], "supported"),
        ([2.0, 2.1, 1.95, 2.02, 2.2, 2.05], [1.0, 1.1, 0.9, 1.05, 0.98, 1.02], "against"),
        # Three runs never decide, nor do equal integers, whose spread is 0 by chance.
        ([1.0, 1.01, 0.99], [2.0, 2.0, 2.01], "undecided"),
        ([1.0, 1.0], [2.0, 2.0], "undecided"),
        ([3.0] * 4, [4.0] * 4, "undecided"),
        ([3.0] * 8, [4.0] * 8, "supported"),
        # Runs that died are worse than any number; six of six decide, as the sign test says.
        ([1.0, 1.2, 1.1, 1.3, 1.0, 1.1], [math.inf] * 6, "supported"),
        ([math.inf] * 6, [math.inf] * 6, "undecided"),
        ([], [], "undecided"),
    ],
)
def test_verdicts(a, b, verdict):
    assert decide(a, b).verdict == verdict


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("later", [math.inf, 7.0])
def test_a_decision_stands_whatever_comes_later(paired, later):
    """The values seen so far choose the law, not the whole table."""
    a, b = RNG.normal(0, 0.1, 6), RNG.normal(1, 0.1, 6)
    early = decide(a, b, paired=paired)
    assert early.verdict == "supported"
    assert early.n < 6
    assert decide([*a, later, 0.0], [*b, 0.0, later], paired=paired).n == early.n


MADE = {
    "gaussian": lambda rng, n: rng.normal(rng.choice([0.0, 1.5]), 1.0, n),
    # Not of 0 and 1 alone, which are yes and no.
    "rounded": lambda rng, n: 3.0 + 2.0 * rng.normal(size=n).round(),
    "constant": lambda rng, n: np.full(n, float(rng.integers(2, 4))),
    "heavy": lambda rng, n: rng.standard_cauchy(n),
    "died": lambda rng, n: np.where(rng.random(n) < 0.4, math.inf, rng.normal(size=n)),
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("sequential", [True, False])
def test_swapped_arms_turn_the_verdict_and_another_unit_does_not(kind, paired, sequential):
    """... and none rests on fewer than four runs an arm, whatever they say."""
    rng = np.random.default_rng(7)
    turned = {"supported": "against", "against": "supported"}
    for trial in range(6):
        n = int(rng.integers(1, 12))
        a, b = MADE[kind](rng, n), MADE[kind](rng, n if paired else int(rng.integers(1, 12)))
        how = {"paired": paired, "sequential": sequential}
        found = decide(a, b, margin=0.8, **how)
        swapped = decide(b, a, margin=0.8, **how)
        assert swapped.verdict == turned.get(found.verdict, found.verdict), trial
        assert swapped.effect == pytest.approx(-found.effect, rel=1e-9, nan_ok=True)
        assert swapped.e_value == pytest.approx(found.e_value, rel=1e-9)
        for unit in (2.0**-1000, math.log(2) / 7, 2.0**900):
            scaled = decide(a * unit, b * unit, margin=0.8 * unit, **how)
            assert (scaled.verdict, scaled.n) == (found.verdict, found.n)
            assert scaled.low == pytest.approx(found.low * unit, rel=1e-9)
        if min(len(a), len(b)) < 4:
            assert found.verdict == "undecided"


def test_values_at_the_end_of_float64_are_judged_without_a_warning():
    """Squares of these are infinite, and of those zero: they were "supported" by a spread of nothing."""
    tiny = np.random.default_rng(0).normal(size=(2, 6)) * 1e-310
    assert decide(*tiny, paired=False, sequential=False).verdict == "undecided"
    largest = np.array([1.7e308, -1.7e308] * 3)
    assert decide(largest, -largest, paired=False, sequential=False).verdict == "undecided"


def test_counts_go_by_their_order_however_few_repeat():
    """Differences 10, 10, 11, 12 of integers have t = 22; four signs alike happen once in eight."""
    assert decide([20.0, 21.0, 22.0, 23.0], [10.0, 11.0, 11.0, 11.0], direction="more").law != "paired t"
    # The same figures with a spread that the grid does not make are Student's.
    rates = np.array([3.2762, 3.2748, 3.2725, 3.2728, 3.2743])
    assert decide(rates, rates[::-1] + 0.01 * np.arange(5)).law == "paired t"


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("sequential", [True, False])
def test_arms_that_both_die_are_not_known_to_be_alike(paired, sequential):
    dead = decide([math.inf] * 9, [math.inf] * 9, paired=paired, sequential=sequential, margin=0.1)
    assert (dead.verdict, dead.low, dead.high) == ("undecided", -math.inf, math.inf)


def test_alike_within_a_margin_is_equivalent():
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 0.01, 12), rng.normal(0, 0.01, 12)
    assert decide(a, b, margin=0.1).verdict == "equivalent"
    assert decide(a, b, margin=0.001).verdict == "undecided"
    assert decide(a, a, margin=0.1).verdict == "equivalent"


def test_ratios_are_taken_on_the_logarithm():
    a, b = np.array([10.0, 100.0, 1000.0, 20.0, 30.0]), np.array([20.1, 199.0, 2010.0, 39.9, 60.3])
    assert decide(a, b).verdict == "undecided"
    ratio = decide(a, b, scale="log")
    assert ratio.verdict == "supported"
    assert ratio.effect == pytest.approx(math.log(0.5), abs=0.01)
    with pytest.raises(InputError, match="no logarithm"):
        decide([0.0, 1.0], [1.0, 1.0], scale="log")


CLAIM = Claim(text="less", metric="final_loss", arm="a", baseline="b")


def test_claims_take_shared_seeds_and_count_the_dead():
    values = {
        "a": dict(enumerate([1.0, 1.1, 1.2, 1.0, 1.1, 1.3, 9.0])),
        "b": dict.fromkeys(range(6), math.nan),
    }
    dead = judge(CLAIM, values)
    assert (dead.judgement, dead.decision.n, dead.decision.censored) == ("supported", 6, 6)
    assert judge(CLAIM, values, worst=None).decision.n == 0
    over_nothing = Claim(text="positive", metric="norm_lead", arm="a", baseline=None, direction="more")
    assert judge(over_nothing, values).judgement == "supported"


def test_runs_beyond_the_deciding_look_add_evidence_for_the_family():
    rng = np.random.default_rng(5)
    values = {"a": dict(enumerate(rng.normal(-3, 1, 16))), "b": dict(enumerate(rng.normal(0, 1, 16)))}
    verdict = judge(CLAIM, values)
    few = judge(
        CLAIM,
        {
            arm: {s: x for s, x in by_seed.items() if s < verdict.decision.n}
            for arm, by_seed in values.items()
        },
    )
    assert (
        (verdict.judgement, verdict.decision.n)
        == (few.judgement, few.decision.n)
        == ("supported", few.decision.n)
    )
    assert verdict.decision.p_value < few.decision.p_value / 10
    assert all(one.holds for one in family([verdict] * 6))


def test_a_family_marks_what_does_not_hold_among_all():
    rng = np.random.default_rng(0)
    weak = {"a": dict(enumerate(rng.normal(-1.2, 1, 8))), "b": dict(enumerate(rng.normal(0, 1, 8)))}
    strong = {"a": dict(enumerate(rng.normal(-9, 1, 8))), "b": dict(enumerate(rng.normal(0, 1, 8)))}
    verdicts = [judge(CLAIM, values, sequential=False) for values in (weak, strong, *[weak] * 4)]
    if verdicts[0].judgement == "undecided":
        assert family(verdicts)[0].holds
    assert family(verdicts)[1].holds


TABLE = "group,seed,val_loss,note\n" + "".join(
    f"a,{s},{1 + s / 100},x\nb,{s},{2 + s * s / 200},y\n" for s in range(6)
)


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "runs.csv"
    file.write_text(TABLE)
    return file


def judged(capsys, table, *words):
    code = main(["judge", str(table), "--arm", "a", "--baseline", "b", *words])
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    "words", [(), ("--paired",), ("--sequential",), ("--scale", "log"), ("--scale", "rank")]
)
def test_anybodys_table(capsys, table, words):
    code, said = judged(capsys, table, "--json", *words)
    body = json.loads(said.out, parse_constant=pytest.fail)
    assert code == 0
    assert body["verdict"] == "supported"
    assert {"n", "effect", "interval", "e_value", "detectable_effect"} <= body.keys()
    code, said = judged(capsys, table, "--better", "higher", *words)
    assert said.out.startswith("against")


def test_runs_that_died_are_said(capsys, table):
    table.write_text(TABLE.replace("b,3,2.045", "b,3,nan").replace("b,4,2.08", "b,4,"))
    _, said = judged(capsys, table)
    assert "b 6 (2 died)" in said.out
    code, said = judged(capsys, table, "--json")
    assert (code, json.loads(said.out, parse_constant=pytest.fail)["baseline"]["died"]) == (0, 2)


@pytest.mark.parametrize(
    ("change", "words", "error"),
    [
        (("", ""), ("--value", "loss"), "no column 'loss'"),
        (("", ""), ("--value", "note"), "is 'x', which is not a number"),
        (("a,0", "c,0"), ("--paired", "--group", "seed"), "no run of seed 'a'"),
        (("a,1", "a,0"), ("--paired",), "occurs twice"),
        (("val_loss", "loss"), ("--margin", "-1"), "above 0"),
        (("a,0,1.0,x", "a,0,1.0"), (), "line 2 has 3 cells"),
        (("a,0,1.0", "a,0,-1.0"), ("--scale", "log"), "no logarithm"),
        ((TABLE, ""), (), "no runs"),
        ((TABLE, "group,seed,x,y\na,0,1,2\nb,0,1,2\n"), (), "--value"),
    ],
)
def test_bad_tables_are_one_line(capsys, table, change, words, error):
    table.write_text(TABLE.replace(*change, 1))
    code, said = judged(capsys, table, *words)
    assert (code, said.out) == (2, "")
    assert error in said.err
    assert len(said.err.splitlines()) == 1


def test_no_table_is_one_line(capsys, tmp_path):
    code, said = judged(capsys, tmp_path / "none.csv")
    assert code == 2
    assert "cannot be read" in said.err


def test_the_medians_interval_covers_it_as_often_as_it_says():
    """Of 200 sets of 25 Gaussian ratios; the bootstrap's 95 % of a median are 90 to 99 at this size (binomial error 1.5)."""
    rng = np.random.default_rng(0)
    covered = [
        low <= 1.0 <= high for low, high in (median_interval(rng.normal(1, 1, (1, 25))) for _ in range(200))
    ]
    assert 0.88 <= np.mean(covered) <= 0.99


def test_what_restarts_do_widens_the_medians_interval():
    rounds = np.random.default_rng(0).normal(0, 0.1, (4, 12))
    one_life = median_interval(rounds.reshape(1, -1))
    low, high = median_interval(rounds + np.array([[-1.0], [-0.5], [0.5], [1.0]]))
    assert high - low > 5 * (one_life[1] - one_life[0])
    assert median_interval(np.full((2, 3), 7.0)) == (7.0, 7.0)


def test_gamma_functions_are_those_of_the_null():
    """C(5, 2) choices, each as likely under a hazard ratio of one."""
    assert log_ratios(np.arange(5.0), np.arange(5) < 2, np.ones(1)) == pytest.approx([0.0], abs=1e-12)
    assert math.exp(special.gammaln(6) - special.gammaln(3) - special.gammaln(4)) == pytest.approx(10)


def test_how_often_verdicts_are_false_is_a_command(capsys):
    words = ["--trials", "3", "--families", "1", "--runs", "7"]
    assert verdict_error.main([*words, "--json"]) == 0
    body = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert {len(body[what]) for what in ("false", "family", "equivalent", "power")} == {18, 9, 10, 8}
    assert verdict_error.upper(0, 300) == pytest.approx(1 - 0.01 ** (1 / 300), rel=1e-9)
    with pytest.raises(InputError, match="at least 4 runs"):
        verdict_error.main(["--runs", "3"])
