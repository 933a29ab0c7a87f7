"""The bootstrap: right, seeded, fast, and clear about missing values."""

import time

import numpy as np
import pytest

from rg_jax.evaluation import bootstrap


def slow_bootstrap(values, resamples, seed):
    """The textbook form: one resample after the other."""
    rng = np.random.default_rng(seed)
    n = len(values)
    return np.array([values[rng.integers(0, n, size=n)].mean(0) for _ in range(resamples)])


def test_the_fast_form_is_the_textbook_form():
    values = np.random.default_rng(0).normal(size=(37, 3))
    sums = bootstrap.resampled_sums(values, resamples=200, seed=5)
    np.testing.assert_allclose(sums / 37, slow_bootstrap(values, 200, 5), rtol=0, atol=1e-12)


def test_chunks_do_not_change_the_draws(monkeypatch):
    values = np.random.default_rng(0).normal(size=(31, 2))
    whole = bootstrap.resampled_sums(values, resamples=97, seed=1)
    for elements in (1, 31, 100, 1000):
        monkeypatch.setattr(bootstrap, "_CHUNK_ELEMENTS", elements)
        np.testing.assert_allclose(
            bootstrap.resampled_sums(values, resamples=97, seed=1), whole, rtol=0, atol=1e-12
        )


def test_the_interval_is_close_to_the_known_one():
    values = np.random.default_rng(0).normal(2.0, 1.0, size=(1000, 1))
    found = bootstrap.bootstrap_means(values)[0]
    error = values.std() / np.sqrt(1000)
    assert found["mean"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert found["n"] == 1000


def test_seeded():
    values = np.random.default_rng(0).random((50, 2))
    assert bootstrap.bootstrap_means(values, 500) == bootstrap.bootstrap_means(values, 500)
    assert bootstrap.bootstrap_means(values, 500, seed=1) != bootstrap.bootstrap_means(values, 500)


def test_more_columns_leave_the_others_alone():
    """Their figures are the same to the last bit, wherever they stand."""
    values = np.random.default_rng(0).random((50, 37))
    together = bootstrap.bootstrap_means(values, 300)
    for chosen in (slice(0, 2), slice(1, 3), slice(15, 20), slice(30, 37)):
        assert together[chosen] == bootstrap.bootstrap_means(values[:, chosen], 300)


def test_two_thousand_samples_and_ten_metrics_take_seconds():
    values = np.random.default_rng(0).random((2000, 10))
    start = time.perf_counter()
    found = bootstrap.bootstrap_means(values)
    assert time.perf_counter() - start < 20  # about 1 s when the machine is free
    assert len(found) == 10


def test_missing_values_have_their_own_n():
    values = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan], [5.0, 7.0, np.nan]])
    first, second, third = bootstrap.bootstrap_means(values, 2000)
    assert (first["mean"], first["n"]) == (3.0, 3)
    assert (second["mean"], second["n"]) == (6.0, 2)
    assert (second["low"], second["high"]) == (5.0, 7.0)
    assert third == {"mean": None, "low": None, "high": None, "n": 0}


def one(statistic, resamples=1000):
    return bootstrap.intervals({"it": statistic}, resamples)["it"]


def test_ratios_are_of_totals_not_means_of_ratios():
    found = one(bootstrap.ratio(np.array([1.0, 9.0, 0.0]), np.array([2.0, 10.0, 0.0])))
    assert found["mean"] == pytest.approx(10 / 12)
    assert found["n"] == 2
    assert (found["low"], found["high"]) == (0.5, 0.9)


def test_a_mean_over_classes_runs_over_those_that_occur():
    numerators = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    denominators = np.array([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0]])
    statistic = bootstrap.mean_of_ratios(numerators, denominators)
    assert statistic.value == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert one(statistic)["n"] == 2
    assert statistic.rows([0]).value == 1.0
    assert np.isnan(bootstrap.mean_of_ratios(np.zeros((2, 0)), np.zeros((2, 0))).value)


def test_rows_of_a_figure_are_the_figure_of_those_rows():
    rng = np.random.default_rng(0)
    values, chosen = rng.random(40), [3, 5, 8, 21]
    assert one(bootstrap.mean(values).rows(chosen)) == one(bootstrap.mean(values[chosen]))


def test_columns_that_figures_share_are_summed_once_and_right():
    base = bootstrap.ratio(np.array([1.0, 2.0, 3.0]), np.ones(3))
    twice = bootstrap.Statistic(base.columns, lambda sums: 2 * sums[..., 0], base.part)
    other = bootstrap.mean(np.array([5.0, 6.0, 7.0]))
    found = bootstrap.intervals({"a": base, "b": twice, "c": other}, 200)
    assert found["a"] == one(base, 200) and found["c"] == one(other, 200)
    assert found["b"]["mean"] == 12.0


def test_one_sample_and_none():
    assert bootstrap.bootstrap_mean(np.array([0.25])) == {
        "mean": 0.25,
        "low": 0.25,
        "high": 0.25,
        "n": 1,
    }
    assert bootstrap.bootstrap_mean(np.array([])) == bootstrap.NO_FIGURE


def difference(a, b, resamples=2000):
    return bootstrap.differences({"it": a}, {"it": b, "more": b}, resamples)["it"]


def test_paired_differences_use_the_same_resamples():
    rng = np.random.default_rng(0)
    hard = rng.random(300)
    a, b = bootstrap.mean(hard + 0.02 + 0.001 * rng.random(300)), bootstrap.mean(hard)
    paired = difference(a, b)
    assert paired["low"] > 0.019 and paired["high"] < 0.022
    # Unpaired, the noise of the samples hides the difference.
    alone = one(a)
    assert alone["high"] - alone["low"] > 0.05
    same = difference(a, a)
    assert (same["mean"], same["low"], same["high"]) == (0.0, 0.0, 0.0)


def test_paired_differences_of_ratios_are_those_of_the_textbook():
    rng = np.random.default_rng(1)
    columns = [rng.integers(1, 5, size=(50, 2)).astype(float) for _ in range(2)]
    a, b = (bootstrap.ratio(c[:, 0], c[:, 1]) for c in columns)
    draws = np.random.default_rng(0).integers(0, 50, size=(300, 50))
    values = [np.subtract(*(c[row, 0].sum() / c[row, 1].sum() for c in columns)) for row in draws]
    found = difference(a, b, 300)
    assert found["mean"] == pytest.approx(a.value - b.value)
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(values, [2.5, 97.5]))


def test_paired_differences_need_the_same_samples():
    a, b = bootstrap.mean(np.array([1.0, np.nan])), bootstrap.mean(np.array([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="same samples"):
        difference(a, b)
    lost = difference(bootstrap.mean(np.array([np.nan, np.nan])), bootstrap.mean(np.ones(2)))
    assert lost == bootstrap.NO_FIGURE


def grounded_scores(rng, n):
    """Scores as G-IoU has them: many zeros, the rest spread over (0, 1)."""
    return np.where(rng.random(n) < 0.3, 0.0, rng.beta(4, 2, n))


@pytest.mark.parametrize("kind", ["mean", "ratio", "difference"])
def test_the_interval_covers_the_truth_as_often_as_it_says(kind):
    """95 % of intervals hold the true value: simulated, with its own binomial error of 4 sigma."""
    rng = np.random.default_rng(7)
    truth = {"mean": 0.7 * 4 / 6, "ratio": 0.6, "difference": 0.05}[kind]
    rounds, n = 600, 200
    covered = 0
    for seed in range(rounds):
        if kind == "mean":
            found = one_of(bootstrap.mean(grounded_scores(rng, n)), seed)
        elif kind == "ratio":  # a precision: samples differ in how many entities they hold
            entities = rng.integers(0, 6, n)
            found = one_of(bootstrap.ratio(rng.binomial(entities, 0.6), entities), seed)
        else:
            hard = grounded_scores(rng, n)
            pair = [bootstrap.mean(hard + e) for e in rng.normal([[0.05], [0.0]], 0.1, (2, n))]
            found = bootstrap.differences({"x": pair[0]}, {"x": pair[1]}, 500, seed)["x"]
        covered += found["low"] <= truth <= found["high"]
    error = 4 * np.sqrt(0.95 * 0.05 / rounds)
    # With 200 samples a percentile interval is known to be a little short.
    assert 0.945 - error < covered / rounds < 0.95 + error


def one_of(statistic, seed):
    return bootstrap.intervals({"x": statistic}, 500, seed)["x"]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="finite"):
        bootstrap.resampled_sums(np.array([[np.nan]]))
    with pytest.raises(ValueError, match="negative"):
        bootstrap.ratio(np.ones(2), -np.ones(2))
