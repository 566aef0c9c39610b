"""Averaged weights and Adam, against the official optimiser's numbers."""

import torch
from conftest import assert_golden
from torch import nn

from meanflow.training.ema import Averages


def test_adam_and_average_match_the_official_numbers(golden):
    """An average that starts from zero, warms up, or lags a step behind the optimiser fails."""
    net = nn.Module()
    net.w = nn.Parameter(golden["opt.p0"].clone())
    averages = Averages(net, {"slow": 0.9, "fast": 0.5})
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, (0.9, 0.95), fused=True)
    fast = golden["opt.p0"].clone()
    for step, gradient in enumerate(golden["opt.grads"], 1):
        net.w.grad = gradient.clone()
        optimizer.step()
        averages.update(net)
        fast = 0.5 * fast + 0.5 * golden[f"opt.p{step}"]
        assert_golden(net.w, golden[f"opt.p{step}"])
        assert_golden(averages.nets["slow"].w, golden[f"opt.ema{step}"])
        assert_golden(averages.nets["fast"].w, fast)


def test_averages_are_in_evaluation_mode():
    """So that pictures of a run show no dropout, while the network itself trains with it."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    averages = Averages(net, {"0.9": 0.9})
    averages.update(net)
    assert net.training and not any(layer.training for layer in averages.nets["0.9"].modules())
