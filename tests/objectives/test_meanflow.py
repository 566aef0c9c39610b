"""The objective, against the official numbers, a twin without cleverness, and flows that are known exactly."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, ZOO, assert_golden, batch_of, guided_draws, perturbed, small_dit
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow.config import MeanFlowConfig
from meanflow.objectives.draws import Draws, guided_rows, make_draws, num_predictions, order_slots
from meanflow.objectives.guidance import guided_velocity
from meanflow.objectives.jvp import jvp
from meanflow.objectives.meanflow import MeanFlow, adaptive_weight, has_dropout, mean_velocity_target
from meanflow.sampler import average_velocity, sample

CASES = json.loads((GOLDEN / "meanflow_dit.json").read_text())["loss_cases"]
INTERVAL_FIRST = torch.tensor([0, 2, 3, 5, 1, 4])  # rows 1 and 4 of the official batch have r = t


def official(name: str, golden, norm_p: float = 1.0):
    """A loss case as (config, x, y, draws), with its r != t rows first."""
    case = CASES[name]
    guidance = (
        {} if case["guidance_eq"] == "none" else {key: case[key] for key in ("omega", "kappa", "t_start", "t_end")}
    )
    config = MeanFlowConfig(meanflow_ratio=4 / 6, norm_p=norm_p, norm_eps=case["norm_eps"], **guidance)
    order = INTERVAL_FIRST
    x, e, t, r = (golden[f"loss.{key}"][order] for key in ("x_nchw", "e_nchw", "t", "r"))
    drop = golden[f"loss.{case['drop']}.mask"][order].bool()
    return config, x, golden["loss.y"][order].long(), guided_draws(config, e, t, r, drop)


@pytest.mark.parametrize("name", CASES)
def test_velocity_target_and_derivative_match_the_official_numbers(name, golden, golden_net):
    """Labels, guided velocity (before and after the drop), u, du_dt and u_tgt, tensor by tensor."""
    config, x, y, draws = official(name, golden)
    t, r, drop = draws.t, draws.r, draws.drop
    keys = ("v_g_pre_nchw", "v_g_nchw", "y_inp", "u_nchw", "du_dt_nchw", "u_tgt_nchw", "raw", "v_loss")
    expected = {key: golden[f"case.{name}.{key}"][INTERVAL_FIRST] for key in keys}
    z_t, v = golden["loss.z_nchw"][INTERVAL_FIRST], golden["loss.v_nchw"][INTERVAL_FIRST]
    null = torch.full_like(y, 10)
    with torch.no_grad():
        u_null, u_cond = (average_velocity(golden_net, z_t, t, t, {"y": label}) for label in (null, y))
    acts = ((config.t_start <= t) & (t <= config.t_end)).view(-1, 1, 1, 1)
    v_g = torch.where(acts, guided_velocity(v, u_null, u_cond, config.omega, config.kappa), v)
    assert_golden(v_g, expected["v_g_pre_nchw"])

    objective = MeanFlow(golden_net, config)
    y_inp = torch.where(drop, null, y)
    assert torch.equal(y_inp, expected["y_inp"].long())
    if config.guided:
        u_flow = objective.u(z_t[4:], t[4:], t[4:], {"y": y_inp[4:]})
        v_g = objective.guide(v, z_t, t, {"y": y_inp}, u_flow, draws.guided)
    else:
        v_g = v
    assert_golden(v_g, expected["v_g_nchw"])
    u, u_tgt, du_dt = mean_velocity_target(lambda z, t, r: objective.u(z, t, r, {"y": y_inp}), z_t, t, r, v_g)
    assert_golden(u, expected["u_nchw"])
    assert_golden(du_dt, expected["du_dt_nchw"])
    assert_golden(u_tgt, expected["u_tgt_nchw"])
    assert_golden((u - u_tgt).square().flatten(1).sum(1), expected["raw"])
    assert_golden((u - v).square().flatten(1).sum(1), expected["v_loss"])


@pytest.mark.parametrize("norm_p", [1.0, 0.75, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_match_the_official_numbers(name, norm_p, golden, golden_net):
    """Mean for sum, a norm squared twice, another epsilon, or a gradient through target, weight or guidance fails."""
    config, x, y, draws = official(name, golden, norm_p)
    out = MeanFlow(golden_net, config)(batch_of(x, y, draws))
    prefix = f"case.{name}.p{norm_p}."
    raw = golden[f"case.{name}.raw"]
    assert_golden(out.loss, golden[prefix + "loss"])
    assert_golden(raw * adaptive_weight(raw, norm_p, config.norm_eps), golden[prefix + "weighted"])
    assert_golden(out.metrics["raw_loss"], raw.mean())
    assert_golden(out.metrics["raw_loss_flow"], raw[[1, 4]].mean())
    assert_golden(out.metrics["raw_loss_meanflow"], raw[[0, 2, 3, 5]].mean())
    assert_golden(out.metrics["raw_loss_channels"].sum(), raw.mean())
    assert_golden(out.metrics["du_dt"], golden[f"case.{name}.du_dt_nchw"][[0, 2, 3, 5]].flatten(1).norm(dim=1).mean())
    out.loss.backward()
    gradients = {key: value for key, value in golden.items() if key.startswith(prefix + "grad.")}
    assert len(gradients) >= 6
    for key, value in gradients.items():
        assert_golden(golden_net.get_parameter(key.removeprefix(prefix + "grad.")).grad, value)


def naive_loss(net, config: MeanFlowConfig, x, y, draws: Draws, **conditions):
    """The objective without any cleverness: everything on the whole batch, the derivative by torch.func.jvp."""

    def u_fn(z, t, r, y):
        out = net(z, t, t - r, y, **conditions)
        return out if config.prediction == "u" else (z - out) / torch.clamp(t, min=config.t_min).view(-1, 1, 1, 1)

    column = (-1, *[1] * (x.ndim - 1))
    t, r = draws.t, draws.r
    z_t = (1 - t).view(column) * x + t.view(column) * draws.e
    v = draws.e - x
    null = torch.full_like(y, net.config.num_classes)
    training = net.training
    net.eval()
    u_null, u_cond = u_fn(z_t, t, t, null).detach(), u_fn(z_t, t, t, y).detach()
    net.train(training)
    v_g = config.omega * v + (1 - config.omega - config.kappa) * u_null + config.kappa * u_cond
    acts = (t >= config.t_start) & (t <= config.t_end) & ~draws.drop
    v_g = torch.where(acts.view(column), v_g, v)
    y = torch.where(draws.drop, null, y)
    with sdpa_kernel(SDPBackend.MATH):
        u, du_dt = torch.func.jvp(
            lambda z, t, r: u_fn(z, t, r, y), (z_t, t, r), (v_g, torch.ones_like(t), torch.zeros_like(r))
        )
    error = (u - (v_g - (t - r).view(column) * du_dt).detach()).square().flatten(1).sum(dim=1)
    return (error / (error.detach() + config.norm_eps) ** config.norm_p).mean()


GUIDANCE = {
    "none": {},
    "kappa 0": {"omega": 2.5},
    "kappa .5": {"omega": 1.0, "kappa": 0.5},
    "interval": {"omega": 0.2, "kappa": 0.92, "t_start": 0.3, "t_end": 0.7},
}


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("prediction", ["u", "x"])
@pytest.mark.parametrize("drop", ["none", "some"])
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_selective_objective_equals_its_naive_twin(ratio, guidance, drop, prediction, dtype, tolerance):
    """Guidance on the wrong rows, rows in the wrong order, a detached main forward: loss or gradients differ."""
    B = 8
    config = MeanFlowConfig(meanflow_ratio=ratio, prediction=prediction, **GUIDANCE[guidance])
    net = small_dit().to(dtype)
    random = torch.Generator().manual_seed(2)
    x, e = torch.randn(2, B, 3, 4, 4, generator=random, dtype=dtype)
    t = torch.linspace(0.15, 0.9, B, dtype=dtype)[torch.randperm(B, generator=random)]
    r = t.clone()
    k = round(B * ratio)
    r[:k] = t[:k] * torch.rand(k, generator=random, dtype=dtype)
    y = torch.randint(5, (B,), generator=random)
    mask = torch.zeros(B, dtype=torch.bool)
    if drop == "some":
        mask[[0, 5]] = True
    draws = guided_draws(config, e, t, r, mask)

    results = []
    for loss in (
        lambda: naive_loss(net, config, x, y, draws),
        lambda: MeanFlow(net, config)(batch_of(x, y, draws)).loss,
    ):
        net.zero_grad()
        value = loss()
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in net.parameters())])
    for expected, actual in zip(*results):
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


class KeyedDropout(nn.Dropout):
    """Dropout whose mask is a function of the layer and the sample, so the same however samples are batched."""

    rows = range(0)  # the samples of the forward that runs

    def forward(self, x):
        if not self.training:
            return x
        generators = (torch.Generator().manual_seed(1000 * self.key + row) for row in self.rows)
        masks = [torch.rand(x.shape[1:], generator=generator) > self.p for generator in generators]
        return x * (torch.stack(masks).to(x.dtype) / (1 - self.p))


def keyed_dropout(net: nn.Module, B: int, k: int) -> nn.Module:
    """The network with such dropout, called with all of B samples, with the first k or with the others (k != B - k)."""
    for key, (name, layer) in enumerate(list(net.named_modules())):
        if type(layer) is nn.Dropout and layer.p:
            keyed = KeyedDropout(layer.p)
            keyed.key = key
            net.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], keyed)

    def say(_, args):
        KeyedDropout.rows = {B: range(B), B - k: range(k, B), k: range(k)}.get(len(args[0]), range(0))

    net.register_forward_pre_hook(say)
    return net


@pytest.mark.parametrize("guidance", ["none", "interval"])
@pytest.mark.parametrize("ratio", [0.25, 0.75])
@pytest.mark.parametrize("name", ZOO)
def test_selective_objective_of_every_network_equals_its_naive_twin(name, ratio, guidance):
    """In training, so with dropout in both forwards, one mask for u and du_dt, and none in guidance."""
    B, k = 8, round(8 * ratio)
    config = MeanFlowConfig(meanflow_ratio=ratio, **GUIDANCE[guidance])
    net = keyed_dropout(ZOO[name]().double().train(), B, k)
    assert has_dropout(net) == name.startswith("UNet")
    random = torch.Generator().manual_seed(2)
    x, e = torch.randn(2, B, *net.z_shape, generator=random, dtype=torch.float64)
    t = torch.linspace(0.15, 0.9, B, dtype=torch.float64)[torch.randperm(B, generator=random)]
    r = torch.where(torch.arange(B) < k, t * torch.rand(B, generator=random, dtype=torch.float64), t)
    y = torch.randint(5, (B,), generator=random)
    draws = guided_draws(config, e, t, r, torch.arange(B) % 5 == 0)
    conditions = {"augment_labels": torch.randn(B, 6, generator=random).double()} if name == "UNet-cifar" else {}

    results = []
    for loss in (
        lambda: naive_loss(net, config, x, y, draws, **conditions),
        lambda: MeanFlow(net, config)(batch_of(x, y, draws, **conditions)).loss,
    ):
        net.zero_grad()
        value = loss()
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for expected, actual in zip(*results):
        assert (actual - expected).abs().max() <= 1e-10 * max(1e-3, expected.abs().max())


def test_guidance_evaluates_the_rows_that_need_it_and_padding():
    """One evaluation of the null class per kept row inside the interval, one of the class per such r != t row."""
    config = MeanFlowConfig(meanflow_ratio=0.25, omega=1.0, kappa=0.5, t_start=0.2, t_end=0.8)
    net, sizes = small_dit(), []
    net.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    t = torch.tensor([0.9, 0.5, 0.1, 0.3, 0.5, 0.7, 0.95, 0.4])
    r = torch.where(torch.arange(8) < 2, 0.05, t)
    drop = torch.tensor([False] * 5 + [True] + [False] * 2)
    guided = guided_rows(config, t, drop)
    assert guided.rows[guided.null].tolist() == [1, 3, 4, 7] and guided.rows[4] == 1
    x, y = torch.randn(8, 3, 4, 4), torch.zeros(8).long()
    draws = guided_draws(config, torch.randn(8, 3, 4, 4), t, r, drop)
    MeanFlow(net, config)(batch_of(x, y, draws))
    assert sizes == [6, num_predictions(config, 8), 2]  # flow matching; guidance; r != t rows


def test_padding_changes_no_number(monkeypatch):
    """The result is that of exactly the predictions that are needed, and that of as many as there can be."""
    config = MeanFlowConfig(meanflow_ratio=0.25, omega=0.7, kappa=0.5, t_start=0.2, t_end=0.8)
    draws, losses = make_draws(config, (3, 4, 4), 0, order_slots(config, range(16), 16)), []
    x, y = torch.randn(16, 3, 4, 4), torch.randint(5, (16,))
    needed = int(draws.guided.acts.sum() + draws.guided.acts[:4].sum())
    for size in (needed, needed + 1, 20):
        monkeypatch.setattr("meanflow.objectives.draws.num_predictions", lambda config, batch, size=size: size)
        guided = guided_rows(config, draws.t, draws.drop)
        assert len(guided.rows) == size
        losses.append(MeanFlow(small_dit(), config)(batch_of(x, y, replace(draws, guided=guided))).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("null_class", ["independent", "flow"])
def test_the_predictions_of_guidance_have_one_size(null_class):
    """So that a compiled step is never compiled again; it is close to what is needed, and a step costs below 4.5 F."""
    options = {"omega": 0.2, "kappa": 0.92, "t_end": 0.75, "class_dropout_prob": 0.1, "null_class": null_class}
    config, B = MeanFlowConfig(**options), 128
    size = num_predictions(config, B)
    assert size < 1.2 * B
    needed = []
    for step in range(200):
        slots = order_slots(config, range(step * B, step * B + B), B)
        guided = make_draws(config, (1, 1, 1), 0, slots).guided
        assert len(guided.rows) == size
        needed.append(guided.acts.sum().item() + guided.acts[:32].sum().item())
    assert max(needed) <= size <= max(needed) + 10


def test_guidance_takes_channel_weights_in_a_list():
    """A config with a list in it has no hash, and the size is kept by what it depends on."""
    assert num_predictions(MeanFlowConfig(kappa=0.5, channel_weights=[1.0, 2.0]), 8) == 10


def test_more_predictions_than_expected_are_evaluated_all_the_same():
    """Here all rows are guided, which is as good as impossible when t is small half of the time."""
    config = MeanFlowConfig(meanflow_ratio=0.25, kappa=0.5, t_end=0.4)
    guided = guided_rows(config, torch.full((64,), 0.3), torch.zeros(64, dtype=torch.bool))
    assert num_predictions(config, 64) < 80 == len(guided.rows)


def test_draws_without_the_rows_that_guidance_needs_are_refused():
    config = MeanFlowConfig(omega=1.0, kappa=0.5, t_start=0.3, t_end=0.6, class_dropout_prob=0.3)
    draws = make_draws(config, (3, 4, 4), seed=0, slots=order_slots(config, range(32), 32))
    assert 0 < draws.guided.acts.sum() < 32
    batch = batch_of(torch.randn(32, 3, 4, 4), torch.randint(5, (32,)), replace(draws, guided=None))
    with pytest.raises(ValueError, match="draws must have guided: make them by MeanFlow.make_draws"):
        MeanFlow(small_dit(), config)(batch)


def test_guidance_begins_at_its_step():
    """Before it the loss is that without guidance, and from it on that of guidance from the start; of equal draws."""
    late = MeanFlowConfig(omega=0.5, kappa=0.6, guidance_from_step=3, null_class="flow")
    guided, plain = replace(late, guidance_from_step=0), replace(late, omega=1.0, kappa=0.0)
    net, x, y = small_dit(), torch.randn(8, 3, 4, 4), torch.randint(5, (8,))
    for step in range(6):
        losses = []
        for config in (late, guided, plain):
            slots = order_slots(config, range(8 * step, 8 * step + 8), 8)
            draws = MeanFlow.make_draws(config, (3, 4, 4), 0, slots, 8)
            losses.append(MeanFlow(net, config)(batch_of(x, y, draws), step).loss.item())
        assert losses[1] != losses[2] and losses[0] == losses[1 if step >= 3 else 2]
    assert MeanFlow.sampling(late.at(3)).guidance_scale == pytest.approx(1.25)
    assert MeanFlow.sampling(late.at(2)).guidance_scale is None
    assert MeanFlow.sampling(late).guidance.endswith("from step 3 on")


def test_guidance_that_acts_on_no_row_changes_nothing():
    """And evaluates the network all the same, since FSDP's ranks must agree on the number of forwards."""
    config = MeanFlowConfig(omega=1.0, kappa=0.5, t_start=0.99, t_end=1.0)
    net, sizes = small_dit(), []
    x, y = torch.randn(4, 3, 4, 4), torch.randint(5, (4,))
    draws = make_draws(config, (3, 4, 4), seed=0, slots=order_slots(config, range(4), 4))
    plain = MeanFlow(net, MeanFlowConfig())(batch_of(x, y, draws))
    net.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    assert torch.equal(MeanFlow(net, config)(batch_of(x, y, draws)).loss, plain.loss)
    assert sizes == [3, num_predictions(config, 4), 1]


class DropoutNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.dropout, self.masks = small_dit(), nn.Dropout(0.5), []
        self.config = self.net.config

    def forward(self, z, t, h, y):
        out = self.dropout(self.net(z, t, h, y))
        self.masks.append((out == 0).double().mean().item())
        return out


def test_guidance_of_a_network_with_dropout_is_evaluated_without():
    """Else the target would carry the dropout's noise."""
    net = DropoutNet().train()
    config = MeanFlowConfig(meanflow_ratio=0.5, omega=1.0, kappa=0.5)
    draws = make_draws(config, (3, 4, 4), seed=0, slots=order_slots(config, range(8), 8))
    MeanFlow(net, config)(batch_of(torch.randn(8, 3, 4, 4), torch.zeros(8).long(), draws))
    main, guidance, interval = net.masks
    assert guidance == 0 and 0.3 < main < 0.7 and 0.3 < interval < 0.7
    assert net.dropout.training


class VolumeNet(nn.Module):
    """A small convolutional network on (B, C, D, H, W), without classes."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv3d(4, 8, 3, padding=1), nn.Conv3d(8, 2, 3, padding=1)

    def forward(self, z, t, h, y=None):
        times = (t * h.exp()).view(-1, 1, 1, 1, 1).expand_as(z[:, :1])
        x = torch.nn.functional.silu(self.first(torch.cat([z, times, times.sin()], dim=1)))
        return self.last(x)


@pytest.mark.parametrize("prediction, volume", [("x", False), ("u", True), ("x", True)])
def test_derivative_equals_central_differences_of_u(prediction, volume):
    """For x-prediction, where u = (z - x_hat) / t has a derivative in t of its own, and for three axes."""
    torch.manual_seed(0)
    net = (perturbed(VolumeNet()) if volume else small_dit()).double()
    shape = (4, 2, 3, 4, 5) if volume else (4, 3, 4, 4)
    cond = {} if volume else {"y": torch.randint(5, (4,))}
    config = MeanFlowConfig(prediction=prediction)
    z, v = torch.randn(2, *shape, dtype=torch.float64)
    r, t = torch.rand(2, 4, dtype=torch.float64).sort(0).values.clamp(min=0.1)
    objective = MeanFlow(net, config)
    _, _, du_dt = mean_velocity_target(lambda z, t, r: objective.u(z, t, r, cond), z, t, r, v)
    step = 1e-5
    ahead, behind = (objective.u(z + s * v, t + s, r, cond) for s in (step, -step))
    torch.testing.assert_close(du_dt, ((ahead - behind) / (2 * step)).detach(), rtol=1e-7, atol=1e-7)


def test_volumes_without_classes_train():
    """The loss of three-axis data is the sum over all of them: against a direct computation at ratio 0."""
    net, config = perturbed(VolumeNet()), MeanFlowConfig(meanflow_ratio=0, norm_p=0)
    x = torch.randn(4, 2, 3, 4, 5)
    draws = make_draws(config, (2, 3, 4, 5), seed=0, slots=range(4))
    z_t = torch.stack([(1 - t) * a + t * e for t, a, e in zip(draws.t, x, draws.e)])
    error = (net(z_t, draws.t, torch.zeros(4), None) - (draws.e - x)).square().sum() / 4
    torch.testing.assert_close(MeanFlow(net, config)(batch_of(x, None, draws)).loss, error)


def test_finite_difference_objective_is_near_the_exact_one():
    """In float32; its documented error is 1e-3 of du_dt."""
    net, x, y = small_dit(), torch.randn(8, 3, 4, 4), torch.randint(5, (8,))
    exact, approximate = (MeanFlowConfig(meanflow_ratio=0.5, jvp=kind) for kind in ("exact", "finite-difference"))
    draws = make_draws(exact, (3, 4, 4), seed=0, slots=order_slots(exact, range(8), 8))
    raw, near = (MeanFlow(net, config)(batch_of(x, y, draws)).metrics["du_dt"] for config in (exact, approximate))
    torch.testing.assert_close(near, raw, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="objective.jvp must be exact for a network with dropout"):
        MeanFlow(DropoutNet().train(), approximate)(batch_of(x, y, draws))


def test_channel_weights_scale_the_loss_but_not_the_raw_loss():
    net, x, y = small_dit(), torch.randn(4, 3, 4, 4), torch.randint(5, (4,))
    plain, weighted = (MeanFlowConfig(norm_p=0, channel_weights=weights) for weights in (None, (1.0, 2.0, 0.5)))
    draws = make_draws(plain, (3, 4, 4), seed=0, slots=order_slots(plain, range(4), 4))
    a, b = (MeanFlow(net, config)(batch_of(x, y, draws)) for config in (plain, weighted))
    channels = a.metrics["raw_loss_channels"]
    torch.testing.assert_close(b.loss, (channels * torch.tensor([1.0, 2.0, 0.5])).sum())
    torch.testing.assert_close(b.metrics["raw_loss"], a.metrics["raw_loss"])
    assert MeanFlow(net, weighted).state_dict().keys() == MeanFlow(net, plain).state_dict().keys()


def test_metrics_over_no_samples_are_left_out_and_all_are_detached():
    net, x, y = small_dit(), torch.randn(4, 3, 4, 4), torch.randint(5, (4,))
    for ratio, absent in ((0.0, {"raw_loss_meanflow", "du_dt"}), (1.0, {"raw_loss_flow"}), (0.5, set())):
        config = MeanFlowConfig(meanflow_ratio=ratio)
        draws = make_draws(config, (3, 4, 4), seed=0, slots=order_slots(config, range(4), 4))
        metrics = MeanFlow(net, config)(batch_of(x, y, draws)).metrics
        everything = {"raw_loss", "raw_loss_channels", "raw_loss_flow", "raw_loss_meanflow", "du_dt"}
        assert metrics.keys() == everything - absent
        assert not any(value.requires_grad or value.isnan().any() for value in metrics.values())


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_guided_gradients_survive_bfloat16_autocast(ratio):
    """Autocast keeps the casts of weights: made first under no_grad, by guidance, they would lose the gradients."""
    x, y = torch.randn(16, 3, 4, 4), torch.randint(5, (16,))
    config = MeanFlowConfig(meanflow_ratio=ratio, omega=1.0, kappa=0.5, norm_p=0)
    draws = make_draws(config, (3, 4, 4), seed=0, slots=order_slots(config, range(16), 16))
    gradients = []
    for enabled in (False, True):
        net = small_dit(hidden_size=64)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = MeanFlow(net, config)(batch_of(x, y, draws)).loss
        assert loss.dtype == torch.float32
        loss.backward()
        gradients.append([p.grad for p in net.parameters()])
    for exact, rounded in zip(*gradients):
        assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_float64_stays_float64():
    net, config = small_dit().double(), MeanFlowConfig()
    x, e = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)
    t = torch.rand(4, dtype=torch.float64)
    draws = Draws(e, t, torch.cat([t[:1] / 2, t[1:]]), torch.zeros(4, dtype=torch.bool))
    assert MeanFlow(net, config)(batch_of(x, torch.zeros(4, dtype=torch.long), draws)).loss.dtype == torch.float64


# For data N(0, s^2) the flow is known: z_t scales with sigma(t) = sqrt((1 - t)^2 s^2 + t^2).
S = 0.6


def sigma(t):
    return ((1 - t) ** 2 * S**2 + t**2).sqrt()


def u_exact(z, t, r):
    """(z_t - z_r) / (t - r), and its limit dz/dt for r = t."""
    t, r = t.view(-1, 1), r.view(-1, 1)
    slope = (t - (1 - t) * S**2) / sigma(t) ** 2
    return z * torch.where(t == r, slope, (1 - sigma(r) / sigma(t)) / (t - r))


def test_exact_average_velocity_of_a_gaussian_is_its_own_target():
    """Eq. (6): a wrong sign, tangent or order of (t, r) fails."""
    z = torch.randn(64, 3, dtype=torch.float64)
    r, t = torch.rand(2, 64, dtype=torch.float64).sort(0).values
    r = torch.minimum(r, t - 0.01).clamp(min=0)
    u, u_tgt, _ = mean_velocity_target(u_exact, z, t, r, u_exact(z, t, t))
    torch.testing.assert_close(u_tgt, u, rtol=1e-7, atol=1e-7)


def test_one_step_of_the_exact_average_velocity_is_the_flow_and_steps_compose():
    e = torch.randn(64, 3, dtype=torch.float64)
    for options in ({"num_steps": 1}, {"num_steps": 7}, {"grid": (1, 0.8, 0.1, 0)}):
        torch.testing.assert_close(sample(u_exact, e, **options), S * e, rtol=1e-12, atol=1e-12)


def bad_call(change):
    config = MeanFlowConfig(meanflow_ratio=0.5)
    draws = make_draws(config, (3, 4, 4), seed=0, slots=order_slots(config, range(4), 4))
    arguments = {"x": torch.randn(4, 3, 4, 4), "y": torch.zeros(4, dtype=torch.long), "draws": draws, **change(draws)}
    config = MeanFlowConfig(meanflow_ratio=0.5, **arguments.pop("config", {}))
    MeanFlow(small_dit(), config)(batch_of(**arguments))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: {"y": torch.tensor([0, 1, 6, 2])}, r"classes must be in \[0, 5\], got 0 to 6"),
        (lambda d: {"y": torch.tensor([0, 1, -1, 2])}, r"classes must be in \[0, 5\], got -1 to 2"),
        (lambda d: {"y": None, "config": {"kappa": 0.5}}, "kappa must be 1 and 0 for data without classes"),
        (lambda d: {"config": {"channel_weights": (1.0, 2.0)}}, "channel_weights must be 3 numbers"),
        (lambda d: {"y": torch.zeros(4)}, "int64, got .* torch.float32"),
        (lambda d: {"x": torch.randn(4, 2, 4, 4)}, r"noise must be \(4, 2, 4, 4\) like the data"),
        (lambda d: {"draws": Draws(*(a.flip(0) for a in (d.e, d.t, d.r, d.drop)))}, "got r = t rows first"),
        (lambda d: {"draws": Draws(d.e, d.r, d.t, d.drop)}, r"r must be <= t, got r = .* in row 0"),
        (lambda d: {"draws": Draws(d.e, d.t[:2], d.r, d.drop)}, r"t, r and drop must be \(4,\)"),
        (lambda d: {"draws": Draws(d.e, d.t + 1, d.r, d.drop)}, r"t and r must be in \[0, 1\]"),
        (lambda d: {"draws": Draws(d.e, d.t, d.r, d.drop.long())}, "drop must be bool, got torch.int64"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        bad_call(change)


def test_naive_twin_uses_the_public_drop_in():
    """meanflow.jvp serves where torch.func.jvp did, in other people's objective."""
    net = small_dit().double()
    z, v = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    t, y = torch.rand(2, dtype=torch.float64), torch.tensor([1, 5])
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = torch.func.jvp(lambda z, t: net(z, t, t, y), (z, t), (v, torch.ones_like(t)))
    _, actual = jvp(lambda z, t: net(z, t, t, y), (z, t), (v, torch.ones_like(t)))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_activation_checkpointing_keeps_fewer_bytes_for_the_same_gradients():
    """Bit for bit in float32; under bf16 autocast, within 3 % of float32's (L2 over L2), with it as without."""
    config, found = MeanFlowConfig(meanflow_ratio=0.5), {}
    x, y = torch.randn(16, 3, 4, 4), torch.randint(5, (16,))
    draws = make_draws(config, (3, 4, 4), 0, order_slots(config, range(16), 16))
    for recompute in (False, True):
        for bf16 in (False, True):
            net = small_dit(depth=6)
            if recompute:
                net.enable_gradient_checkpointing()
            kept = {}

            def keep(tensor, kept=kept):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = MeanFlow(net, config)(batch_of(x, y, draws)).loss
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
            found[recompute, bf16] = gradient, sum(storage.nbytes() for storage in kept.values())
    exact, most = found[False, False]
    assert torch.equal(found[True, False][0], exact) and torch.equal(found[True, True][0], found[False, True][0])
    print({case: size for case, (_, size) in found.items()})
    assert found[True, False][1] < 0.5 * most and found[True, True][1] < 0.5 * found[False, True][1]
    assert (found[True, True][0] - exact).norm() < 0.03 * exact.norm()
