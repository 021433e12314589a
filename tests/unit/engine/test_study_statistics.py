"""The statistics of a study: distributions against numbers that scipy 1.17 gives, verdicts, error rates and coverage on made-up runs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from engine.study.distributions import (
    f_upper,
    incomplete_beta,
    noncentral_t_power,
    shift_of_power,
    signed_rank_p,
    t_cdf,
    t_quantile,
    t_two_sided,
)  # fmt: skip
from engine.study.records import RunRecord, Status, Study
from engine.study.statistics import Paired, Verdict, analyse, detectable_difference, holm, paired_differences, together

METRIC = "metrics/mAP_0.5:0.95"


def make_study(values: dict[str, dict[int, float]], **records: RunRecord) -> Study:
    """A study whose runs have these values, by variant and seed; the first variant is the baseline."""
    runs = [RunRecord(variant, seed, Status.FINISHED, {METRIC: v}) for variant, seeds in values.items() for seed, v in seeds.items()]
    return Study((*runs, *records.values()), baseline=next(iter(values), "baseline"))


def simulated(rng: np.random.Generator, *, seeds: int, effects: tuple[float, ...], sd: float = 0.006) -> Study:
    """Variants whose true difference to the baseline is ``effects``; a seed moves all variants alike, and each by itself."""
    shared = rng.normal(0.4, 0.01, seeds)
    rows = {f"v{i}": shared + effect + rng.normal(0, sd, seeds) for i, effect in enumerate((0.0, *effects))}
    return make_study({name: dict(enumerate(row.tolist())) for name, row in rows.items()})


@pytest.mark.parametrize(
    ("t", "df", "expected"),
    [
        (0.1, 1, 0.936548965138893), (1, 2, 0.4226497308103742), (2.776, 4, 0.05002277831997642), (5, 4, 0.007490433881274525),
        (12, 4, 0.000276428548502973), (40, 9, 1.8982998449339832e-11), (1.96, 1000, 0.050273184955748736), (3, 29, 0.005499192133903412),
    ],
)  # fmt: skip
def test_p_values_of_t_equal_scipy(t, df, expected):
    assert float(t_two_sided(t, df)) == pytest.approx(expected, rel=1e-11)
    assert float(t_two_sided(-t, df)) == float(t_two_sided(t, df))
    assert float(t_cdf(-t, df)) == pytest.approx(expected / 2, rel=1e-11)
    assert float(t_cdf(t, df)) == pytest.approx(1 - expected / 2, rel=1e-11)


@pytest.mark.parametrize(
    ("p", "df", "expected"),
    [
        (0.975, 1, 12.706204736174694), (0.975, 2, 4.302652729749462), (0.975, 4, 2.7764451051977934), (0.995, 4, 4.604094871349992),
        (0.9, 9, 1.3830287383966329), (0.2, 3, -0.9784723123633038), (0.995, 1, 63.656741162871526), (0.975, 120, 1.9799304050824402),
    ],
)  # fmt: skip
def test_quantiles_of_t_equal_scipy(p, df, expected):
    assert t_quantile(p, df) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    ("f", "df", "df_rest", "expected"),
    [(1.1, 24, 48, 0.3788740112969475), (3.0, 2, 4, 0.16), (0.2, 5, 10, 0.9551917702464295), (12.5, 3, 6, 0.005434681644290473)],
)
def test_p_values_of_f_equal_scipy(f, df, df_rest, expected):
    assert f_upper(f, df, df_rest) == pytest.approx(expected, rel=1e-9)


def controlled_study() -> Study:
    """Three variants, two of them with a control; one is better than its control and not than the baseline."""
    values = {
        "none": {0: 0.40, 1: 0.42, 2: 0.41, 3: 0.40},
        "SE": {0: 0.41, 1: 0.415, 2: 0.412, 3: 0.402},
        "SE control": {0: 0.37, 1: 0.376, 2: 0.371, 3: 0.363},
        "EMA": {0: 0.40, 1: 0.41, 2: 0.415, 3: 0.41},
        "EMA control": {0: 0.41, 1: 0.40, 2: 0.41, 3: 0.405},
        "SimAM": {0: 0.41, 1: 0.41, 2: 0.40, 3: 0.41},
    }
    study = make_study(values)
    of = {"SE control": ("SE",), "EMA control": ("EMA", "EMA again")}
    return replace(study, records=tuple(replace(r, settings={"control_of": of.get(r.variant, ())}) for r in study.records))


def test_variants_are_compared_with_their_controls():
    study = controlled_study()
    first, second = analyse(study).to_controls
    assert study.controls == {"SE": "SE control", "EMA": "EMA control", "EMA again": "EMA control"}
    assert [(c.variant, c.reference, c.family) for c in (first, second)] == [("SE", "SE control", 2), ("EMA", "EMA control", 2)]
    assert first.paired.mean == pytest.approx(np.mean([0.04, 0.039, 0.041, 0.039]))
    assert (first.verdict, second.verdict) == (Verdict.BETTER, Verdict.NO_EVIDENCE)
    assert all(c.verdict is not Verdict.BETTER for c in analyse(study).comparisons)


def test_all_variants_are_taken_as_one():
    found = {t.what: t for t in analyse(controlled_study()).together}
    assert list(found) == ["all variants and none"]  # of controls there are too few
    rows = np.array([[0.01, -0.005, 0.002, 0.002], [0, -0.01, 0.005, 0.01], [0.01, -0.01, -0.01, 0.01]])
    (one,) = found.values()
    assert (one.count, one.paired.count) == (3, 4)
    assert one.paired.mean == pytest.approx(rows.mean())
    assert one.paired.sd == pytest.approx(rows.mean(axis=0).std(ddof=1))
    assert (one.f, one.p) == pytest.approx((0.12611991729841487, 0.883785483456425), rel=1e-6)
    assert one.sentence == "+0.1 ± 1.2 (4 seeds); no evidence that the variants differ among themselves (F = 0.13, p = 0.88)"


def test_the_test_of_differences_among_variants_keeps_its_level():
    rng = np.random.default_rng(4)
    p = []
    for _ in range(2000):
        base, noise = rng.normal(0.4, 0.01, 3), rng.normal(0, 0.005, (8, 3))
        pairs = [(dict(enumerate((base + row).tolist())), dict(enumerate(base.tolist()))) for row in noise]
        p.append(together("", pairs).p)
    assert 0.04 <= np.mean(np.array(p) < 0.05) <= 0.06


def test_pairs_that_lack_a_seed_are_left_out_of_the_whole():
    whole = [({0: 0.4, 1: 0.5 + i / 100}, {0: 0.41, 1: 0.5}) for i in range(3)]
    assert together("", [*whole, ({0: 0.9}, {0: 0.1})]).paired.mean == together("", whole).paired.mean
    assert together("", whole[:2]) is None
    assert together("", [({0: 0.4}, {0: 0.4})] * 4) is None


def test_the_ends_of_the_beta_function_are_exact():
    assert incomplete_beta(0.5, 2, np.array([0.0, 1.0])).tolist() == [0.0, 1.0]
    assert incomplete_beta(100, 0.5, 0.5) == pytest.approx(6.255662994307364e-32, rel=1e-10)
    assert float(t_two_sided(math.inf, 4)) == 0.0
    assert float(t_two_sided(0.0, 4)) == 1.0


@pytest.mark.parametrize(
    ("critical", "df", "shift", "expected"),
    [
        (2.776, 4, 3, 0.6193816544543758), (4.604, 4, 5, 0.6534302448850092), (2.262, 9, 2.5, 0.6061916080392985),
        (2.045, 29, 0.0, 0.050024075922411614), (4.303, 2, 6, 0.8356948286634508),
    ],
)  # fmt: skip
def test_power_equals_scipy(critical, df, shift, expected):
    assert noncentral_t_power(critical, df, shift) == pytest.approx(expected, rel=1e-9)
    if shift:
        assert shift_of_power(critical, df, expected) == pytest.approx(shift, rel=1e-8)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.1, 2.2, -0.5, 3, 4], 0.125), ([1, 2, 3, 4, 5], 0.0625), ([1, 1, -1, 2, 2, 3], 0.125), ([0, 1, -2, 2, 3, 0], 0.5),
        ([0.3, -0.3, 0.3, 0.3, -0.3, 0.5, 0.6], 0.265625), ([1, -2, 3, 4, 5, -6, 7, 8, 9, 10, 11, 12], 0.01220703125), ([1.5], 1.0),
        ([0, 0, 0], 1.0), ([], 1.0),
    ],
)  # fmt: skip
def test_signed_ranks_with_ties_and_zeros_equal_the_enumeration_of_scipy(differences, expected):
    assert signed_rank_p(np.array(differences, dtype=float)) == pytest.approx(expected, rel=1e-12)


def test_paired_differences_equal_scipy():
    differences = [0.8, 0.5, 1.2, 0.1, 0.9]
    paired = paired_differences(dict(enumerate(differences)), dict.fromkeys(range(5), 0.0))
    assert paired.p_t == pytest.approx(0.020092107013114587, rel=1e-11)
    assert paired.interval == pytest.approx((0.18057468315821612, 1.2194253168417837), rel=1e-11)
    assert paired.p_wilcoxon == 0.0625


def test_holm_steps_down_in_the_order_given():
    assert holm(np.array([0.01, 0.04, 0.03])).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm(np.array([0.9, 0.5])).tolist() == [1.0, 1.0]
    assert holm(np.array([0.02]), family=4).tolist() == pytest.approx([0.08])
    assert holm(np.zeros(0)).tolist() == []


def test_a_known_effect_gives_the_right_verdicts():
    rng = np.random.default_rng(3)
    verdicts = [[c.verdict for c in analyse(simulated(rng, seeds=5, effects=(0.04, -0.04, 0.0))).comparisons] for _ in range(200)]
    better, worse, same = ([row[i] for row in verdicts] for i in range(3))
    assert better.count(Verdict.BETTER) >= 195
    assert worse.count(Verdict.WORSE) >= 195
    assert same.count(Verdict.NO_EVIDENCE) >= 180  # 190 are expected
    assert better.count(Verdict.WORSE) == worse.count(Verdict.BETTER) == 0


def test_sentences_state_size_uncertainty_seeds_and_correction():
    base = {0: 0.40, 1: 0.41, 2: 0.39, 3: 0.405, 4: 0.395}
    gains = (0.010, 0.006, 0.012, 0.007, 0.005)
    noise = (0.010, -0.006, 0.012, -0.009, 0.005)
    study = make_study({"none": base, "SE": {s: v + gains[s] for s, v in base.items()}, "EMA": {s: v + noise[s] for s, v in base.items()}})
    better, unknown = analyse(study).comparisons
    assert better.sentence == "better by 0.8 ± 0.4 (5 seeds, p = 0.007 after Holm)"
    assert unknown.sentence == "no evidence of a difference; 5 seeds would show ≥ 1.9"
    scattered = {0: 0.3, 1: 0.9, 2: 0.1}
    few = analyse(make_study({"none": {s: base[s] for s in scattered}, "SE": scattered, "EMA": scattered})).comparisons[0]
    assert few.sentence == "no evidence of a difference; 3 seeds are too few to show any"  # 60 points are all that the baseline lacks
    alone = analyse(replace(study, records=tuple(r for r in study.records if r.variant != "EMA"))).comparisons[0]
    assert alone.sentence == "better by 0.8 ± 0.4 (5 seeds, p = 0.004)"


def test_what_the_correction_takes_away_is_said():
    base = dict.fromkeys(range(5), 0.4)
    weak = {s: 0.4 + d for s, d in enumerate((0.012, 0.003, 0.010, 0.001, 0.006))}
    others = {f"v{i}": {s: 0.4 + d for s, d in enumerate((0.01, -0.01, 0.002, -0.004, 0.003 + i / 1000))} for i in range(4)}
    comparison = analyse(make_study({"none": base, "weak": weak, **others})).comparisons[0]
    assert comparison.verdict is Verdict.NO_EVIDENCE
    assert comparison.sentence.endswith("(p = 0.036; after Holm, 5 comparisons, = 0.18)")


def test_at_most_one_null_study_in_twenty_has_a_false_verdict():
    """Twenty times 1,000 studies of 6 variants, as one 1,000 scatters by 0.7 %; those that go through ``analyse`` agree with them."""
    rng = np.random.default_rng(0)
    values = rng.normal(0.4, 0.01, (20_000, 1, 5)) + rng.normal(0, 0.006, (20_000, 6, 5))  # (studies, variants, seeds)
    differences = values[:, 1:] - values[:, :1]
    t = differences.mean(axis=2) / (differences.std(axis=2, ddof=1) / math.sqrt(5))
    false = (holm(t_two_sided(t, 4)) < 0.05).any(axis=1)
    for study, expected in zip(values[:100], false[:100]):
        comparisons = analyse(make_study({f"v{i}": dict(enumerate(row.tolist())) for i, row in enumerate(study)})).comparisons
        assert len(comparisons) == 5
        assert any(c.verdict is not Verdict.NO_EVIDENCE for c in comparisons) == expected
    assert 0.03 <= false.mean() <= 0.05


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_cover_the_truth(seeds):
    truth = 0.007
    differences = np.random.default_rng(seeds).normal(truth, 0.01, (20_000, seeds))
    mean, half = differences.mean(axis=1), t_quantile(0.975, seeds - 1) * differences.std(axis=1, ddof=1) / math.sqrt(seeds)
    zero = dict.fromkeys(range(seeds), 0.0)
    intervals = [paired_differences(dict(enumerate(row.tolist())), zero).interval for row in differences[:100]]
    np.testing.assert_allclose(intervals, np.stack((mean - half, mean + half), axis=1)[:100], atol=1e-12)
    assert 0.93 <= (np.abs(mean - truth) <= half).mean() <= 0.97


def test_the_detectable_difference_is_found_four_times_in_five():
    """As in a study: the difference that its seeds would show, at 5 % over its family of three."""
    sd, seeds, family = 0.01, 5, 3
    paired = Paired(seeds, 0.0, sd)
    differences = np.random.default_rng(5).normal(detectable_difference(paired, family), sd, (20_000, seeds))
    t = differences.mean(axis=1) / (differences.std(axis=1, ddof=1) / math.sqrt(seeds))
    assert 0.79 <= (t_two_sided(t, seeds - 1) < 0.05 / family).mean() <= 0.81


def test_an_empty_study_is_ordinary():
    analysis = analyse(Study((), baseline="none"))
    assert (analysis.summaries, analysis.comparisons, analysis.notes) == ((), (), ())


def test_one_seed_is_not_tested():
    comparison = analyse(make_study({"none": {0: 0.4}, "SE": {0: 0.41}})).comparisons[0]
    assert comparison.verdict is Verdict.UNTESTED
    assert comparison.sentence == "not tested: one seed in common, a difference of +1.0 that may be noise; give 5 seeds"


def test_only_seeds_that_finished_for_both_are_paired():
    study = make_study({"none": {0: 0.40, 1: 0.41, 2: 0.42, 3: 0.40}, "SE": {1: 0.42, 2: 0.44, 5: 0.9}})
    failed = RunRecord("SE", 3, Status.FAILED, reason="out of memory")
    comparison = analyse(replace(study, records=(*study.records, failed))).comparisons[0]
    assert comparison.seeds == (1, 2)
    assert comparison.paired.mean == pytest.approx(0.015)


def test_a_variant_or_baseline_that_failed_is_reported():
    failed = RunRecord("bad", 0, Status.FAILED, reason="expected 64 channels, got 32")
    pending = RunRecord("later", 0, Status.PENDING)
    analysis = analyse(make_study({"none": {0: 0.4, 1: 0.5}}, failed=failed, pending=pending))
    assert [c.sentence for c in analysis.comparisons] == ["not tested: no seed finished for both this variant and the baseline"] * 2
    alone = analyse(Study((failed,), baseline="none"))
    assert alone.notes == (f"baseline 'none': no finished run with {METRIC}; nothing can be compared",)


def test_variants_that_were_stopped_early_count_in_the_family():
    base = {0: 0.40, 1: 0.41, 2: 0.39, 3: 0.405, 4: 0.395}
    better = {s: v + d for (s, v), d in zip(base.items(), (0.010, 0.006, 0.012, 0.007, 0.005))}
    stopped = [RunRecord(f"s{i}", 0, Status.STOPPED, {METRIC: 0.1}) for i in range(3)]
    study = make_study({"none": base, "SE": better})
    first, *rest = analyse(replace(study, records=(*study.records, *stopped))).comparisons
    assert first.family == 4
    assert first.p_holm == pytest.approx(4 * first.paired.p_t)
    assert {c.sentence for c in rest} == {"not tested: stopped early by the study's rule"}


def test_seeds_without_effect_are_no_evidence():
    comparison = analyse(make_study({"none": dict.fromkeys(range(3), 0.4), "SE": dict.fromkeys(range(3), 0.41)})).comparisons[0]
    assert comparison.sentence == "not tested: the same difference of +1.0 for every seed, so the seeds changed nothing"


def test_runs_without_the_metric_and_repeated_seeds_are_notes():
    study = make_study({"none": {0: 0.4, 1: 0.5}, "SE": {0: math.nan, 1: 0.5}})
    twice = RunRecord("none", 0, Status.FINISHED, {METRIC: 0.45})
    analysis = analyse(replace(study, records=(*study.records, twice)))
    assert analysis.summaries[0].values == {0: 0.45, 1: 0.5}
    assert [note.split(":")[0] for note in analysis.notes] == ["none, seed 0", "SE, seed 0"]
