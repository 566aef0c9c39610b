"""Draws: exact counts, laws of the times against closed forms and the official samplers, and independence of slots."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN
from torch import Tensor

from meanflow.config import MeanFlowConfig
from meanflow.noise import noise
from meanflow.objectives.draws import (
    Draws,
    drop_labels,
    has_interval,
    make_draws,
    num_meanflow,
    num_predictions,
    order_slots,
    sample_times,
)

STATS = json.loads((GOLDEN / "time_sampler_stats.json").read_text())
N = 100_000


def normal_cdf(x: Tensor, mean: float, std: float) -> Tensor:
    """P(sigmoid(mean + std * N(0, 1)) <= x)."""
    return 0.5 * (1 + torch.erf((x.logit() - mean) / std / math.sqrt(2)))


def times(config: MeanFlowConfig, interval: bool | Tensor = True) -> tuple[Tensor, Tensor]:
    normals = torch.randn(N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return sample_times(config, normals, torch.as_tensor(interval).expand(N))


def kolmogorov(sample: Tensor, cdf) -> float:
    """sqrt(N) times the largest distance of the empirical distribution function from cdf."""
    x = sample.double().sort().values
    steps = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    expected = cdf(x)
    return math.sqrt(len(x)) * max((steps[1:] - expected).max().item(), (expected - steps[:-1]).max().item())


CRITICAL = 2.23  # Kolmogorov's distribution exceeds it with probability 1e-4


@pytest.mark.parametrize("P_mean, P_std", [(-0.4, 1.0), (-2.0, 2.0)])
def test_v0_times_are_the_maximum_and_minimum_of_two_logit_normals(P_mean, P_std):
    """P(max <= x) = F(x)^2 and P(min <= x) = 1 - (1 - F(x))^2, at N = 100,000 and level 1e-4."""
    t, r = times(MeanFlowConfig(P_mean=P_mean, P_std=P_std))
    assert kolmogorov(t, lambda x: normal_cdf(x, P_mean, P_std) ** 2) < CRITICAL
    assert kolmogorov(r, lambda x: 1 - (1 - normal_cdf(x, P_mean, P_std)) ** 2) < CRITICAL
    t, r = times(MeanFlowConfig(P_mean=P_mean, P_std=P_std), False)
    assert torch.equal(t, r) and kolmogorov(t, lambda x: normal_cdf(x, P_mean, P_std) ** 2) < CRITICAL


def test_v1_keeps_t_and_takes_the_smaller_of_two_different_logit_normals_for_r():
    """P(t <= x) = F_t(x), P(r <= x) = 1 - (1 - F_t(x)) (1 - F_r(x)): CIFAR-10's improved sampler."""
    config = MeanFlowConfig(time_sampler="v1", P_mean=-0.6, P_std=1.6, P_mean_r=-4.0, P_std_r=1.6)
    t, r = times(config)

    def F_t(x):
        return normal_cdf(x, -0.6, 1.6)

    assert kolmogorov(t, F_t) < CRITICAL
    # r = t has positive probability, which the law of the minimum includes.
    assert kolmogorov(r, lambda x: 1 - (1 - F_t(x)) * (1 - normal_cdf(x, -4.0, 1.6))) < CRITICAL


OFFICIAL = {
    "mf_Pmean-0.4_Pstd1.0_prop0.75": MeanFlowConfig(),
    "mf_Pmean-2.0_Pstd2.0_prop0.25": MeanFlowConfig(P_mean=-2.0, P_std=2.0),
    "py_meanflow_v0_paper_script": MeanFlowConfig(P_mean=-2.0, P_std=2.0),
    "py_meanflow_v1_default_script": MeanFlowConfig(
        time_sampler="v1", P_mean=-0.6, P_std=1.6, P_mean_r=-4.0, P_std_r=1.6
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_times_agree_with_the_official_samplers_draws(name):
    """At the official 100,000 draws' quantiles our share below is within 4.5 standard errors of two samples."""
    t, r = times(OFFICIAL[name])
    compared = [(t, "t", N)]
    if name.startswith("mf"):
        n = STATS[name]["n"] - STATS[name]["n_equal"]
        compared += [(r, "r_where_different", n), (t, "t_where_different", n), (t - r, "gap_where_different", n)]
    else:
        differ = r < t
        assert (
            name.endswith("paper_script")
            or abs(0.75 * differ.double().mean() - (1 - STATS[name]["frac_equal"])) < 0.005
        )
        compared += [(r[differ], "r_where_different", int(N * 0.7))]
    for ours, key, n in compared:
        for p, quantile in STATS[name][key]["quantiles"].items():
            p, below = float(p), (ours.double() <= quantile).double().mean()
            assert abs(below - p) < 4.5 * math.sqrt(p * (1 - p) * (1 / n + 1 / len(ours))), (key, p)


def test_x_prediction_draws_no_time_below_t_min():
    """Its velocity divides by t; u-prediction is not touched."""
    t, r = times(MeanFlowConfig(prediction="x", t_min=0.3))
    assert t.min() == 0.3 and (r <= t).all() and r.min() < 0.3
    assert times(MeanFlowConfig(t_min=0.3))[0].min() < 0.2


@pytest.mark.parametrize("global_batch, ratio", [(256, 0.25), (64, 0.5), (10, 0.25), (6, 0.25), (8, 1.0), (8, 0.0)])
def test_exact_count_of_intervals_in_every_global_batch_spread_evenly(global_batch, ratio):
    config = MeanFlowConfig(meanflow_ratio=ratio)
    first = has_interval(config, range(3 * global_batch), global_batch)
    assert first.view(3, -1).sum(1).tolist() == [round(global_batch * ratio)] * 3
    halves = first[:global_batch].chunk(2)
    assert abs(int(halves[0].sum()) - int(halves[1].sum())) <= 1


def test_every_division_of_the_global_batch_holds_its_exact_share_first():
    config = MeanFlowConfig(meanflow_ratio=0.25)
    for size in (4, 8, 16, 32):
        for start in range(0, 64, size):
            slots = order_slots(config, range(start, start + size), 32)
            draws = make_draws(config, (1,), 0, slots, 32)
            k = num_meanflow(config, size)
            assert (draws.r[:k] < draws.t[:k]).all() and torch.equal(draws.r[k:], draws.t[k:])


def test_micro_batch_that_cannot_hold_the_share_is_refused():
    with pytest.raises(ValueError, match=r"micro-batch of 6 cannot hold .* 8 r != t samples in every 32"):
        order_slots(MeanFlowConfig(), range(6), 32)
    with pytest.raises(ValueError, match="r = t slots stand before r != t ones"):
        make_draws(MeanFlowConfig(), (1,), 0, range(8))


def test_draws_of_a_slot_do_not_depend_on_its_company():
    """Of the batch's size, of the order, of what else is drawn; they do depend on the seed."""
    config = MeanFlowConfig(meanflow_ratio=1.0, class_dropout_prob=0.5)
    together = make_draws(config, (2, 3), 7, range(8))
    for slot in range(8):
        alone = make_draws(config, (2, 3), 7, [slot], 8)
        for name in ("e", "t", "r", "drop"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[slot])
    assert not torch.equal(make_draws(config, (2, 3), 8, range(8)).e, together.e)
    assert torch.equal(make_draws(config, (5,), 7, range(8)).t, together.t)


def test_noise_is_standard_normal_and_different_in_every_slot():
    config = MeanFlowConfig()
    e = make_draws(config, (64,), 0, order_slots(config, range(1024), 1024)).e
    assert kolmogorov(e.flatten(), lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2)))) < CRITICAL
    correlation = torch.corrcoef(e[:128]).fill_diagonal_(0)
    assert correlation.abs().max() < 0.7
    assert torch.equal(noise(3, [5, 9], (2, 2))[1], noise(3, [9], (2, 2))[0])


@pytest.mark.parametrize("null_class", ["independent", "flow"])
def test_label_drop_has_its_probability_and_its_coupling(null_class):
    """Both drop a tenth overall, within 4.5 standard errors; "flow" drops no r != t sample, as the official code."""
    config = MeanFlowConfig(null_class=null_class)
    interval = has_interval(config, range(N), N)
    drop = drop_labels(config, torch.rand(N, generator=torch.Generator().manual_seed(0)), interval)
    assert abs(drop.double().mean() - 0.1) < 4.5 * math.sqrt(0.09 / N)
    among = drop[interval].double().mean()
    assert among == 0 if null_class == "flow" else abs(among - 0.1) < 4.5 * math.sqrt(0.09 / (N / 4))


def test_draws_move_to_a_device_whole():
    draws = make_draws(MeanFlowConfig(kappa=0.5), (3,), 0, order_slots(MeanFlowConfig(), range(8), 8))
    moved = draws.to("meta")
    assert isinstance(moved, Draws) and moved.e.is_meta and moved.drop.is_meta and moved.guided[1].is_meta


def test_uniform_times_are_the_larger_and_the_smaller_of_two_uniform_numbers():
    """P(t <= s) = s^2 and P(r <= s) = 1 - (1 - s)^2; guidance counts by the same law."""
    config = MeanFlowConfig(meanflow_ratio=1.0, time_sampler="uniform", class_dropout_prob=0.0)
    draws = make_draws(config, (1,), 0, range(20_000))
    for share in (0.2, 0.5, 0.9):
        assert abs((draws.t <= share).double().mean() - share**2) < 0.015
        assert abs((draws.r <= share).double().mean() - (1 - (1 - share) ** 2)) < 0.015
    guided = replace(config, omega=2.0, t_end=0.5, class_dropout_prob=0.1)
    assert num_predictions(guided, 4000) < 0.3 * 4000 < num_predictions(replace(guided, time_sampler="v0"), 4000)
