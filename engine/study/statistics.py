"""Is a variant better than the baseline? Paired tests over seeds, corrected for the number of comparisons, and the verdict as a sentence.

A pair is one seed that finished for both. The mean difference has a 95 % interval by Student's t; p-values are of the paired t-test and of
Wilcoxon's signed-rank test; the verdict follows the t-test after Holm's correction over all variants that are compared. Where it finds
nothing, the sentence says how large a true difference would have had to be to be found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from engine.study.distributions import f_upper, shift_of_power, signed_rank_p, t_quantile, t_two_sided
from engine.study.records import RunRecord, Status, Study
from utils.text_table import counted

Array = NDArray[np.float64]
ALPHA = 0.05  # chance of a false verdict, over the whole family
POWER = 0.8  # chance to find a difference of the size that is called detectable
LEVEL = 0.95  # of intervals, each by itself
SAME = 1e-9  # metrics are read from files of at most ten digits: smaller differences are rounding
POINTS = 100  # metrics in 0-1 are shown as points, as papers print them
ENOUGH_SEEDS = 5
FEWEST_TOGETHER = 3  # variants that are also taken as one


class Verdict(Enum):
    """What the seeds say about a variant."""

    BETTER = "better"
    WORSE = "worse"
    NO_EVIDENCE = "no evidence of a difference"
    UNTESTED = "not tested"


@dataclass(frozen=True)
class Paired:
    """Differences over pairs, variant minus baseline, in the unit of the metric; NaN where there are too few."""

    count: int
    mean: float = math.nan
    sd: float = math.nan  # of the differences
    half_width: float = math.nan  # of the 95 % interval
    p_t: float = math.nan
    p_wilcoxon: float = math.nan
    constant: bool = False  # whether all differences are the same, so that nothing can be tested

    @property
    def interval(self) -> tuple[float, float]:
        return self.mean - self.half_width, self.mean + self.half_width


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline, or against its capacity control.

    Attributes:
        reference: the variant that it is compared with.
        paired: over the seeds that finished for both.
        seeds: of these pairs.
        family: number of comparisons that Holm's correction counts.
        p_holm: p-value of the paired t-test after the correction; NaN where nothing was tested.
        detectable: smallest true difference that the paired t-test finds with a chance of 80 % at 5 % / ``family``, if differences scatter
            as these do; NaN where nothing was tested.
        most: the largest difference to the reference that is possible, as a metric lies between 0 and 1.
        reason: why nothing was tested; empty otherwise.
        stopped: whether that is because the study's rule stopped it early.
    """

    variant: str
    reference: str
    paired: Paired
    seeds: tuple[int, ...] = ()
    family: int = 1
    p_holm: float = math.nan
    detectable: float = math.nan
    most: float = 1.0
    reason: str = ""
    stopped: bool = False

    @property
    def verdict(self) -> Verdict:
        if self.reason:
            return Verdict.UNTESTED
        if self.p_holm >= ALPHA:
            return Verdict.NO_EVIDENCE
        return Verdict.BETTER if self.paired.mean > 0 else Verdict.WORSE

    @property
    def sentence(self) -> str:
        """The verdict with its numbers, in points: ``better by 0.8 ± 0.5 (5 seeds, p = 0.01 after Holm)``."""
        if self.verdict is Verdict.UNTESTED:
            return f"not tested: {self.reason}"
        seeds = counted(self.paired.count, "seed")
        if self.verdict is Verdict.NO_EVIDENCE:
            detectable = POINTS * self.detectable
            shown = f"would show ≥ {detectable:.{digits_of(detectable)}f}"
            shows = shown if self.detectable < self.most else "are too few to show any"
            return f"no evidence of a difference; {seeds} {shows}{self._remark}"
        by = shown_difference(abs(self.paired.mean), self.paired.half_width)
        correction = " after Holm" if self.family > 1 else ""
        return f"{self.verdict.value} by {by} ({seeds}, p {shown_p(self.p_holm)}{correction})"

    @property
    def _remark(self) -> str:
        if self.paired.p_t >= ALPHA:
            return ""
        return f" (p {shown_p(self.paired.p_t)}; after Holm, {self.family} comparisons, {shown_p(self.p_holm)})"


@dataclass(frozen=True)
class Summary:
    """The finished seeds of a variant, in the unit of the metric."""

    variant: str
    values: Mapping[int, float]  # by seed
    runs: int
    failed: int
    stopped: int

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.values.values()))) if self.values else math.nan

    @property
    def sd(self) -> float:
        """Over seeds, with n - 1; NaN of fewer than two."""
        return float(np.std(list(self.values.values()), ddof=1)) if len(self.values) > 1 else math.nan


@dataclass(frozen=True)
class Together:
    """Several variants taken as one, and whether they differ among themselves.

    Attributes:
        what: which differences these are, in words.
        count: of variants.
        paired: over seeds, the mean over the variants of their differences.
        f, p: of the variants in an analysis of variance of the differences by variant and seed, without interaction: large and small where
            the variants differ by more than one variant's seeds do.
    """

    what: str
    count: int
    paired: Paired
    f: float
    p: float

    @property
    def sentence(self) -> str:
        """In points: ``-0.5 ± 0.9 (3 seeds); no evidence that the variants differ among themselves (F = 1.1, p = 0.34)``."""
        found = "the variants differ among themselves" if self.p < ALPHA else "no evidence that the variants differ among themselves"
        mean = f"{shown_difference(self.paired.mean, self.paired.half_width, signed=True)} ({counted(self.paired.count, 'seed')})"
        return mean if math.isnan(self.f) else f"{mean}; {found} (F = {self.f:.2f}, p {shown_p(self.p)})"


@dataclass(frozen=True)
class Analysis:
    """What the statistics of a study found.

    Attributes:
        summaries: of every variant, the baseline too.
        comparisons: of every variant but the baseline.
        to_controls: of every variant that has a capacity control, with that; a family of their own.
        together: all variants as one, where there are enough.
        image_noise: by variant, the mean over seeds of the standard deviation of the metric over resampled validation images, for the same
            weights; variants of which it was not measured are left out.
        notes: lines for the report.
    """

    summaries: tuple[Summary, ...]
    comparisons: tuple[Comparison, ...]
    to_controls: tuple[Comparison, ...]
    together: tuple[Together, ...]
    image_noise: Mapping[str, float]
    notes: tuple[str, ...]


def analyse(study: Study) -> Analysis:
    """Compares every variant of a study with its baseline. A study without runs, with one seed or with failed runs is ordinary."""
    notes = list(study.notes)
    summaries = {variant: summarise(study, variant, notes) for variant in study.variants}
    baseline = summaries.get(study.baseline)
    if study.records and (baseline is None or not baseline.values):
        notes.append(f"baseline {study.baseline!r}: no finished run with {study.metric}; nothing can be compared")
    others = [s for s in summaries.values() if s.variant != study.baseline]
    comparisons = correct_family([compare(s, baseline or Summary(study.baseline, {}, 0, 0, 0)) for s in others])
    controls = {variant: control for variant, control in study.controls.items() if variant in summaries}
    to_controls = correct_family([compare(summaries[v], summaries[control], called="its control") for v, control in controls.items()])
    noise = {variant: image_noise(study, variant) for variant in study.variants}
    return Analysis(
        summaries=tuple(summaries.values()),
        comparisons=tuple(comparisons),
        to_controls=tuple(to_controls),
        together=tuple(_together(study, summaries)),
        image_noise={v: n for v, n in noise.items() if not math.isnan(n)},
        notes=tuple(notes),
    )


def summarise(study: Study, variant: str, notes: list[str]) -> Summary:
    """The finished values of one variant by seed; a line is added to ``notes`` for each thing that is left out."""
    records = [record for record in study.records if record.variant == variant]
    values: dict[int, float] = {}
    for record in records:
        if record.status is not Status.FINISHED:
            continue
        value = record.metrics.get(study.metric, math.nan)
        if not math.isfinite(value):
            notes.append(f"{variant}, seed {record.seed}: finished without {study.metric}; the run is left out")
            continue
        if record.seed in values:
            notes.append(f"{variant}, seed {record.seed}: several finished runs; the last one counts")
        values[record.seed] = value
    count = {status: sum(r.status is status for r in records) for status in Status}
    return Summary(variant, values, len(records), count[Status.FAILED], count[Status.STOPPED])


def compare(variant: Summary, reference: Summary, *, called: str = "the baseline") -> Comparison:
    """A variant against another one, before the correction for the number of comparisons."""
    seeds = tuple(sorted(variant.values.keys() & reference.values.keys()))
    paired = paired_differences(variant.values, reference.values)
    stopped = variant.stopped > 0 and len(seeds) < 2
    if stopped:
        reason = "stopped early by the study's rule"
    elif not seeds:
        reason = f"no seed finished for both this variant and {called}"
    elif len(seeds) == 1:
        reason = f"one seed in common, a difference of {POINTS * paired.mean:+.1f} that may be noise; give {ENOUGH_SEEDS} seeds"
    elif paired.constant:
        reason = f"the same difference of {POINTS * paired.mean:+.1f} for every seed, so the seeds changed nothing"
    else:
        reason = ""
    usual = np.mean([reference.values[seed] for seed in seeds]) if seeds else 0.0
    most = float(max(usual, 1 - usual))
    return Comparison(variant.variant, reference.variant, paired, seeds, most=most, reason=reason, stopped=stopped)


def _together(study: Study, summaries: Mapping[str, Summary]) -> Iterator[Together]:
    """All variants against the baseline, all controls against it, and all variants against their controls."""
    controls = study.controls
    plain = [v for v in summaries if v != study.baseline and v not in controls.values()]
    groups = {
        f"all variants and {study.baseline}": [(v, study.baseline) for v in plain],
        f"all controls and {study.baseline}": [(v, study.baseline) for v in dict.fromkeys(controls.values())],
        "all variants and their controls": [*controls.items()],
    }
    for what, pairs in groups.items():
        known = [(summaries[v].values, summaries[other].values) for v, other in pairs if v in summaries and other in summaries]
        if found := together(what, known):
            yield found


def together(what: str, pairs: Sequence[tuple[Mapping[int, float], Mapping[int, float]]]) -> Together | None:
    """Variants and what each is compared with, values by seed, taken as one; None for fewer than ``FEWEST_TOGETHER`` pairs or two seeds.

    Seeds that most pairs have are counted, and the pairs that have all of these.
    """
    by_pair = [values.keys() & reference.keys() for values, reference in pairs]
    seeds = sorted({s for one in by_pair for s in one if 2 * sum(s in other for other in by_pair) > len(by_pair)})
    kept = [pair for pair, own in zip(pairs, by_pair) if own.issuperset(seeds)]
    if len(kept) < FEWEST_TOGETHER or len(seeds) < 2:
        return None
    differences = np.array([[values[s] - reference[s] for s in seeds] for values, reference in kept])  # (V, S)
    variants, count = differences.shape
    of_variant, of_seed = differences.mean(axis=1), differences.mean(axis=0)
    rest = differences - of_variant[:, None] - of_seed + differences.mean()
    freedom = (variants - 1, (variants - 1) * (count - 1))
    noise = float((rest**2).sum()) / freedom[1]
    f = count * float(of_variant.var(ddof=1)) / noise if noise > SAME**2 else math.nan
    paired = paired_differences(dict(zip(seeds, of_seed.tolist())), dict.fromkeys(seeds, 0.0))
    return Together(what, variants, paired, f, f_upper(f, *freedom) if math.isfinite(f) else math.nan)


def correct_family(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with p-values after Holm's correction and what each could have detected.

    A variant that the study's rule stopped was looked at too, so it counts in the family, as one that would not have been found.
    """
    tested = [c for c in comparisons if not c.reason]
    family = len(tested) + sum(c.stopped for c in comparisons)
    adjusted = iter(holm(np.array([c.paired.p_t for c in tested]), family=family))
    corrected = []
    for c in comparisons:
        is_tested = not c.reason
        p = float(next(adjusted)) if is_tested else math.nan
        detectable = detectable_difference(c.paired, family) if is_tested else math.nan
        corrected.append(replace(c, family=family, p_holm=p, detectable=detectable))
    return corrected


def paired_differences(variant: Mapping[int, float], baseline: Mapping[int, float]) -> Paired:
    """Statistics of variant minus baseline over the seeds that both have, NaN left out."""
    pairs = [variant[seed] - baseline[seed] for seed in sorted(variant.keys() & baseline.keys())]
    differences = np.array([d for d in pairs if math.isfinite(d)])
    differences[np.abs(differences) < SAME] = 0.0
    n = len(differences)
    if n == 0:
        return Paired(0)
    mean = float(differences.mean())
    if n == 1:
        return Paired(1, mean)
    if np.ptp(differences) < SAME:
        return Paired(n, mean, 0.0, 0.0, constant=True)
    sd = float(differences.std(ddof=1))
    error = sd / math.sqrt(n)
    return Paired(
        count=n,
        mean=mean,
        sd=sd,
        half_width=t_quantile((1 + LEVEL) / 2, n - 1) * error,
        p_t=float(t_two_sided(mean / error, n - 1)),
        p_wilcoxon=signed_rank_p(np.round(differences / SAME)),
    )


def detectable_difference(paired: Paired, family: int) -> float:
    """The smallest true difference that these seeds find with a chance of ``POWER``, by the noncentral t, at ``ALPHA / family``."""
    df = paired.count - 1
    critical = t_quantile(1 - ALPHA / family / 2, df)
    return shift_of_power(critical, df, POWER) * paired.sd / math.sqrt(paired.count)


def holm(p: Array, *, family: int | None = None) -> Array:
    """p-values (..., m) after Holm's step-down correction, in the order given.

    Args:
        p: (..., m), m comparisons of each study, without NaN.
        family: number of hypotheses where it is larger than m; those beyond count as never rejected.

    Source:
        Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    order = np.argsort(p, axis=-1, kind="stable")
    factors = max(family or 0, p.shape[-1]) - np.arange(p.shape[-1])
    steps = np.minimum(1.0, np.maximum.accumulate(np.take_along_axis(p, order, axis=-1) * factors, axis=-1))
    adjusted = np.empty(p.shape)
    np.put_along_axis(adjusted, order, steps, axis=-1)
    return adjusted


def image_noise(study: Study, variant: str) -> float:
    """Mean over the finished seeds of the metric's standard deviation over resampled images; NaN where it was not measured."""
    found = [r.image_noise.get(study.metric, math.nan) for r in finished(study.records) if r.variant == variant]
    known = [value for value in found if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


def finished(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs that ended as planned."""
    return [record for record in records if record.status is Status.FINISHED]


def digits_of(spread: float) -> int:
    """Decimals at which a spread in points is no zero: one, for spreads below 0.1 two or three."""
    return 1 if not 0 < spread < 0.095 else 2 if spread >= 0.0095 else 3


def shown_difference(difference: float, spread: float, *, signed: bool = False) -> str:
    """A difference and what it is uncertain by, in points: ``0.8 ± 0.5``; the latter left out where it is NaN."""
    digits = digits_of(POINTS * spread)
    text = f"{POINTS * difference:{'+' if signed else ''}.{digits}f}"
    return text if math.isnan(spread) else f"{text} ± {POINTS * spread:.{digits}f}"


def shown_p(p: float) -> str:
    """A p-value with its sign: ``= 0.012``, ``< 0.001``."""
    if p < 0.001:
        return "< 0.001"
    return f"= {p:.2f}" if p >= 0.095 else f"= {p:.3f}"
