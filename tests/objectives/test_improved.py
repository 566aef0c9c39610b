"""Improved MeanFlow, against the official numbers and against a twin without cleverness."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import DEVICES, GOLDEN, TOLD, assert_golden, batch_of, guided_draws, imf_weights, perturbed
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow.config import (
    FREE_ON_RESUME,
    ImprovedMeanFlowConfig,
    MeanFlowConfig,
    TrainConfig,
    different,
    recipe_fields,
)
from meanflow.objectives.draws import Draws, order_slots
from meanflow.objectives.improved import ImprovedMeanFlow, draw_guidance, guided_rows, make_draws, num_null
from meanflow.objectives.jvp import jvp
from meanflow.objectives.meanflow import MeanFlow, adaptive_weight
from meanflow.sampler import average_velocity, expand, guidance_conditions, sample
from meanflow.training.optimizer import split_by_decay
from models import MODELS
from models.dit import DiT
from models.imf import IMF, rotate


@pytest.fixture(params=DEVICES)
def golden_imf(request) -> dict:
    torch.backends.cudnn.allow_tf32 = False  # float32 to its last digits
    return load_file(GOLDEN / "imf_dit.safetensors", device=request.param)


@pytest.fixture
def imf(golden_imf) -> IMF:
    net = IMF(8, 2, 4, 64, 3, 4, aux_head_depth=2, num_classes=10).to(golden_imf["fwd.t"].device)
    net.load_state_dict(imf_weights({name[2:]: v for name, v in golden_imf.items() if name.startswith("w.")}))
    return net


def conditions(golden: dict, prefix: str, y: str) -> dict:
    numbers = {"omega": "omega", "t_start": "t_min", "t_end": "t_max"}
    return {"y": golden[y].long()} | {name: golden[f"{prefix}.{official}"] for name, official in numbers.items()}


def test_the_networks_parts_match_the_official_numbers(golden_imf, imf):
    """Embeddings, positions, one shared block, both heads' last blocks, u and v."""
    fwd = {name[4:]: value for name, value in golden_imf.items() if name.startswith("fwd.")}
    seen = {}

    def watch(name: str, module) -> None:
        module.register_forward_hook(lambda module, inputs, out: seen.update({name: out}))

    block = imf.shared_blocks[0]
    names = {"x_embedder": imf.x_embedder, "h_embedder": imf.h_embedder, "omega_embedder": imf.omega_embedder}
    names |= {"cfg_t_start_embedder": imf.cfg_t_start_embedder, "cfg_t_end_embedder": imf.cfg_t_end_embedder}
    names |= {"shared0_attn": block.attn, "shared0_mlp": block.mlp, "shared0": block, "qnorm": block.attn.q_norm}
    names |= {"u_head1": imf.u_heads[1], "v_head1": imf.v_heads[1], "y_embedder": imf.y_embedder.embedding_table}
    for name, module in names.items():
        watch(name, module)
    features = imf.trunk(fwd["z_nchw"], fwd["t"], fwd["h"], **conditions(golden_imf, "fwd", "fwd.y"))
    assert_golden(imf.u(features), fwd["u_nchw"])
    assert_golden(imf.v(features), fwd["v_nchw"])
    for name in names:
        key = next(key for key in (f"{name}_out", name, "shared0_qnorm") if key in fwd)
        actual = seen[name].transpose(1, 2) if name == "qnorm" else seen[name]
        assert_golden(actual, fwd[key])
    assert_golden(imf.rotary_cos, fwd["rope_cos"])
    assert_golden(imf.rotary_sin, fwd["rope_sin"])
    turned = rotate(seen["qnorm"], imf.rotary_cos, imf.rotary_sin).transpose(1, 2)
    expected = fwd["shared0_q_rot"]
    assert_golden(turned, torch.cat([expected[..., 0::2], expected[..., 1::2]], dim=-1))
    probe = torch.nn.RMSNorm(64, eps=1e-6, device=features.device)
    assert_golden(probe(golden_imf["probe.rmsnorm_in"]), golden_imf["probe.rmsnorm_out"])


@pytest.mark.parametrize(
    "size, training, inference",
    [
        ("B", 145_596_960, 88_935_184),
        ("M", 230_570_016, 173_908_240),
        ("L", 509_752_352, 409_054_224),
        ("XL", 711_113_760, 610_415_632),
    ],
)
def test_networks_have_the_official_numbers_of_parameters(size, training, inference):
    """With the v head, and without it."""
    with torch.device("meta"):
        net = MODELS[f"iMF-{size}/2"](input_size=32, in_channels=4, num_classes=1000)
    assert net.num_parameters() == training
    net.drop_v_head()
    assert net.num_parameters() == inference and not net.config.v_head


def test_a_fresh_network_has_the_official_initialisation():
    """Zero output and gates; standard deviations by the fan-in, of which blocks have 0.32."""
    net = IMF(8, 2, 4, 256, 3, 4, aux_head_depth=2, num_classes=10)
    block = net.u_heads[0]
    z, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    features = net.trunk(z, t, t, torch.tensor([1, 10]))
    assert (net.u(features) == 0).all() and (net.v(features) == 0).all()
    assert (block.attn_scale == 0).all() and (block.mlp_scale == 0).all() and (block.norm1.weight == 1).all()
    for weight, std in (
        (block.attn.q_proj.weight, 0.32 / 16),
        (block.mlp.fc2.weight, 0.32 / 682**0.5),
        (net.omega_embedder.mlp[0].weight, 1 / 16),
        (net.class_tokens, 1 / 16),
        (net.y_embedder.embedding_table.weight, 1 / 16),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.1)


def test_derivative_matches_the_official_numbers(golden_imf, imf):
    """Along (v, 1, 0), and its two parts."""
    cond = conditions(golden_imf, "fwd", "fwd.y")
    z, t, r, v = (golden_imf[name] for name in ("fwd.z_nchw", "fwd.t", "fwd.r", "jvp.v_nchw"))
    for name, tangents in {
        "du_dt": (v, torch.ones_like(t), torch.zeros_like(t)),
        "part_z": (v, torch.zeros_like(t), torch.zeros_like(t)),
        "part_t": (torch.zeros_like(v), torch.ones_like(t), torch.zeros_like(t)),
    }.items():
        _, derivative = jvp(lambda z, t, r: average_velocity(imf, z, t, r, cond), (z, t, r), tangents)
        assert_golden(derivative, golden_imf[f"jvp.{name}_nchw"])


CASES = {"main_drop0": ("main", "drop0"), "main_drop2": ("main", "drop2"), "nofm_drop2": ("nofm", "drop2")}


def official(case: str, golden: dict, norm_p: float):
    """A loss case as (config, x, y, draws, order), with its r != t rows first."""
    scenario, drop = (f"loss.{part}" for part in CASES[case])
    is_flow = golden[f"{scenario}.fm_mask"].bool()
    order = torch.cat([(~is_flow).nonzero()[:, 0], is_flow.nonzero()[:, 0]])
    config = ImprovedMeanFlowConfig(float((~is_flow).float().mean()), norm_p=norm_p)
    x, y, e = (golden[f"loss.{name}"][order] for name in ("x_nchw", "y", "e_nchw"))
    cond = conditions(golden, scenario, "loss.y")
    cond = {name: values[order] for name, values in cond.items() if name != "y"}
    t, r, dropped = golden[f"{scenario}.t"][order], golden[f"{scenario}.r"][order], golden[f"{drop}.mask"][order]
    return config, x, y.long(), guided_draws(config, e, t, r, dropped.bool(), **cond), order


@pytest.mark.parametrize("case", CASES)
def test_guided_velocity_and_tangent_match_the_official_numbers(case, golden_imf, imf):
    config, x, y, draws, order = official(case, golden_imf, 1.0)
    objective, k = ImprovedMeanFlow(imf, config), round(6 * config.meanflow_ratio)
    t = draws.t.view(-1, 1, 1, 1)
    z_t, v = (1 - t) * x + t * draws.e, draws.e - x
    y_seen = torch.where(draws.drop, 10, y)
    expected = {name: golden_imf[f"case.{case}.{name}"][order] for name in ("v_c_nchw", "v_g_nchw", "y_inp")}
    assert torch.equal(y_seen, expected["y_inp"].long())
    flow = {name: values[k:] for name, values in {**draws.cond, "y": y_seen}.items()}
    with torch.no_grad():
        v_flow = objective.v_at(z_t[k:], draws.t[k:], flow) if k < 6 else v[:0]
    v_g, v_c = objective.guide(v, z_t, draws.t, {**draws.cond, "y": y}, v_flow, draws.guided)
    assert_golden(v_g, expected["v_g_nchw"])
    assert_golden(v_c[:k], expected["v_c_nchw"][:k])


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_tensor_of_a_case_is_met(case, golden_imf, imf):
    """Row by row: the predictions of guidance, v_g before the drop, u, v, du/dt, V, and both losses of each power."""
    config, x, y, draws, order = official(case, golden_imf, 1.0)
    objective, k, t = ImprovedMeanFlow(imf, config), round(6 * config.meanflow_ratio), draws.t
    z_t, v_t = (1 - expand(t, x)) * x + expand(t, x) * draws.e, draws.e - x
    everywhere, null = guidance_conditions(1.0, (0.0, 1.0), t), torch.full_like(y, 10)
    seen = {**draws.cond, "y": torch.where(draws.drop, null, y)}
    found = {
        "v_u_nchw": objective.v_at(z_t, t, {**everywhere, "y": null}),
        "v_c_fm_nchw": objective.v_at(z_t, t, {**everywhere, "omega": draws.cond["omega"], "y": y}),
    }
    kept = guided_draws(config, draws.e, t, draws.r, torch.zeros_like(draws.drop), **draws.cond)
    with torch.no_grad():
        v_flow = objective.v_at(z_t[k:], t[k:], {name: a[k:] for name, a in {**draws.cond, "y": y}.items()})
    found["v_g_pre_nchw"], found["v_c_nchw"] = objective.guide(v_t, z_t, t, {**draws.cond, "y": y}, v_flow, kept.guided)
    v_g, _ = objective.guide(v_t, z_t, t, {**draws.cond, "y": y}, v_flow, draws.guided)
    tangents = found["v_c_nchw"], torch.ones_like(t), torch.zeros_like(t)
    (u, features), (du_dt, _) = jvp(lambda *at: objective.u_and_features(*at, seen), (z_t, t, draws.r), tangents)
    v, V = objective.v_of(features, z_t, t), u + expand(t - draws.r, x) * du_dt
    raw_u, raw_v = ((a - v_g).square().flatten(1).sum(1) for a in (V, v))
    found |= {
        "u_nchw": u,
        "v_nchw": v,
        "du_dt_nchw": du_dt,
        "V_nchw": V,
        "v_g_nchw": v_g,
        "raw_u": raw_u,
        "raw_v": raw_v,
    }
    for norm_p in (1.0, 0.75, 0.5):
        for name, raw in (("loss_u", raw_u), ("loss_v", raw_v)):
            found[f"p{norm_p}.{name}"] = raw * adaptive_weight(raw, norm_p, config.norm_eps)
    for name, value in found.items():
        assert_golden(value, golden_imf[f"case.{case}.{name}"][order])
    for name, raw in (("mon_loss_u", raw_u), ("mon_loss_v", raw_v)):
        assert_golden(raw.mean() / x[0].numel(), golden_imf[f"case.{case}.{name}"])
    recorded = {name.removeprefix(f"case.{case}.") for name in golden_imf if name.startswith(f"case.{case}.")}
    others = {"y_inp", "mon_loss_u", "mon_loss_v"}  # the first is met by the test above
    assert {name for name in recorded - found.keys() - others if not re.search(r"grad|\.loss$", name)} == set()


@pytest.mark.parametrize("norm_p", [1.0, 0.75, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_match_the_official_numbers(case, norm_p, golden_imf, imf):
    """A mean for a sum, the tangent v_g, guidance of the wrong rows, a gradient through du/dt: all fail."""
    config, x, y, draws, order = official(case, golden_imf, norm_p)
    out = ImprovedMeanFlow(imf, config)(batch_of(x, y, draws))
    prefix = f"case.{case}.p{norm_p}."
    raw_u, raw_v = golden_imf[f"case.{case}.raw_u"], golden_imf[f"case.{case}.raw_v"]
    assert_golden(out.loss, golden_imf[prefix + "loss"])
    assert_golden(out.metrics["raw_loss"], raw_u.mean())
    assert_golden(out.metrics["raw_loss_v"], raw_v.mean())
    k = round(6 * config.meanflow_ratio)
    assert_golden(out.metrics["raw_loss_meanflow"], raw_u[order[:k]].mean())
    assert_golden(out.metrics["raw_loss_channels"].sum(), raw_u.mean())
    du_dt = golden_imf[f"case.{case}.du_dt_nchw"][order[:k]]
    assert_golden(out.metrics["du_dt"], du_dt.flatten(1).norm(dim=1).mean())
    out.loss.backward()
    gradients = {key: value for key, value in golden_imf.items() if key.startswith(prefix + "grad.")}
    assert len(gradients) >= 10
    for name, value in imf_weights({key.removeprefix(prefix + "grad."): v for key, v in gradients.items()}).items():
        assert_golden(imf.get_parameter(name).grad, value)


def test_samples_match_the_official_numbers(golden_imf, imf):
    """In one step and in four, at one scale and interval, without the head that only training needs."""
    e, y = golden_imf["sample.noise_nchw"], golden_imf["sample.y"].long()
    numbers = zip(("omega", "t_start", "t_end"), golden_imf["sample.omega_tmin_tmax"])
    cond = {"y": y, **{name: value.expand(len(e)) for name, value in numbers}}
    imf.drop_v_head()
    with torch.no_grad():
        u_fn = partial(average_velocity, imf, cond=cond)
        assert_golden(sample(u_fn, e, 1), golden_imf["sample.one_nchw"])
        for step in range(1, 5):
            grid = torch.linspace(1, 0, 5).tolist()[: step + 1]
            assert_golden(sample(u_fn, e, grid=grid), golden_imf[f"sample.four_step{step}_nchw"])


def naive_loss(net, config: ImprovedMeanFlowConfig, x, y, draws: Draws):
    """The objective without any cleverness: every forward for every row, the derivative by torch.func.jvp."""
    has_v_head = isinstance(net, IMF)
    column = (-1, 1, 1, 1)
    t, r, null = draws.t, draws.r, torch.full_like(y, 5)
    z_t, v = (1 - t).view(column) * x + t.view(column) * draws.e, draws.e - x
    one, zero = torch.ones_like(t), torch.zeros_like(t)

    def velocity(out, z, t):
        return out if config.prediction == "u" else (z - out) / torch.clamp(t, min=config.t_min).view(column)

    def both(z, t, h, *cond):
        if not has_v_head:
            u = velocity(net(z, t, h, cond[0], omega=cond[1], t_start=cond[2], t_end=cond[3]), z, t)
            return u, u
        features = net.trunk(z, t, h, *cond)
        return velocity(net.u(features), z, t), velocity(net.v(features), z, t)

    start, end = draws.cond["t_start"], draws.cond["t_end"]
    omega = torch.where((start <= t) & (t <= end), draws.cond["omega"], 1.0)
    with torch.no_grad():
        v_c = both(z_t, t, zero, y, omega, zero, one)[1]
        v_u = both(z_t, t, zero, null, one, zero, one)[1]
    v_g = v + (1 - 1 / omega).view(column) * (v_c - v_u)
    v_g = torch.where(draws.drop.view(column), v, v_g)
    cond = torch.where(draws.drop, null, y), draws.cond["omega"], start, end
    with sdpa_kernel(SDPBackend.MATH):
        (u, v_hat), (du_dt, _) = torch.func.jvp(lambda z, t, r: both(z, t, t - r, *cond), (z_t, t, r), (v_c, one, zero))
    V = u + (t - r).view(column) * du_dt.detach()
    errors = [(V - v_g).square().flatten(1).sum(1)]
    errors += [(v_hat - v_g).square().flatten(1).sum(1)] if has_v_head else []
    return sum((error / (error.detach() + config.norm_eps) ** config.norm_p).mean() for error in errors)


def compare(net, config: ImprovedMeanFlowConfig, draws: Draws, y, tolerance: float = 1e-10) -> None:
    x, results = torch.randn(draws.e.shape, generator=torch.Generator().manual_seed(1)).to(draws.e), []
    for loss in (
        lambda: naive_loss(net, config, x, y, draws),
        lambda: ImprovedMeanFlow(net, config)(batch_of(x, y, draws)).loss,
    ):
        net.zero_grad()
        value = loss()
        value.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]
        results.append([value.detach(), *gradients])
    for expected, actual in zip(*results):
        assert (actual - expected).abs().max() <= tolerance * max(1e-3, expected.abs().max())


def some_draws(net, ratio: float, drop: str, interval: str, batch: int = 8) -> tuple[Draws, torch.Tensor]:
    random, k = torch.Generator().manual_seed(2), round(batch * ratio)
    e = torch.randn(batch, *net.z_shape, generator=random, dtype=torch.float64)
    t = torch.linspace(0.15, 0.9, batch, dtype=torch.float64)[torch.randperm(batch, generator=random)]
    r = torch.where(torch.arange(batch) < k, t * torch.rand(batch, generator=random, dtype=torch.float64), t)
    uniform = torch.rand(batch, 3, generator=random, dtype=torch.float64)
    config = ImprovedMeanFlowConfig(ratio)
    cond = draw_guidance(config, uniform, k if interval == "part" else 0)
    dropped = torch.isin(torch.arange(batch), torch.tensor([0, 5] if drop == "some" else []))
    return guided_draws(config, e, t, r, dropped, **cond), torch.randint(5, (batch,), generator=random)


@pytest.mark.parametrize("prediction", ["u", "x"])
@pytest.mark.parametrize("interval", ["full", "part"])
@pytest.mark.parametrize("drop", ["none", "some"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["iMF", "DiT, omega"])
def test_selective_objective_equals_its_naive_twin(name, ratio, drop, interval, prediction):
    """From perturbed weights: a guided row that is left out, or a v of other conditions, changes loss or gradients."""
    net = perturbed(TOLD[name](), 0.05).double()
    draws, y = some_draws(net, ratio, drop, interval)
    compare(net, ImprovedMeanFlowConfig(ratio, prediction=prediction), draws, y)


@pytest.mark.parametrize("name", ["UNet, omega", "UNet-cifar, omega"])
def test_selective_objective_of_a_unet_equals_its_naive_twin(name):
    net = TOLD[name]().double()
    draws, y = some_draws(net, 0.5, "some", "part")
    compare(net, ImprovedMeanFlowConfig(0.5), draws, y)


@pytest.mark.parametrize("name", TOLD)
def test_derivative_equals_central_differences(name):
    """In float64, with the conditions of guidance, which are constants."""
    net = TOLD[name]().double()
    draws, y = some_draws(net, 1.0, "none", "part")
    cond = {"y": y, **draws.cond}
    point, v, step = (draws.e, draws.t, draws.r), torch.randn_like(draws.e), 1e-4
    direction = v, torch.ones_like(draws.t), torch.zeros_like(draws.t)

    def u_fn(z, t, r):
        return average_velocity(net, z, t, r, cond)

    _, du_dt = jvp(u_fn, point, direction)
    with torch.no_grad():
        ahead, behind = (u_fn(*(p + sign * step * d for p, d in zip(point, direction))) for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    assert expected.abs().max() > 1e-3
    assert (du_dt - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_scales_have_their_density(beta):
    """The distribution function of omega^-beta on [1, 8], in closed form."""
    config = ImprovedMeanFlowConfig(omega_beta=beta)
    share = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None].expand(-1, 3)
    omega = draw_guidance(config, share, 101)["omega"]
    assert omega[0] == 1 and omega[-1] == pytest.approx(8)
    integral = omega.log() if beta == 1 else (omega ** (1 - beta) - 1) / (1 - beta)
    torch.testing.assert_close(integral / integral[-1], share[:, 0], rtol=1e-10, atol=1e-12)


def test_draws_are_a_function_of_the_slot_and_leave_those_of_meanflow_alone():
    """The same slot in another micro-batch, and the noise and times of the plain objective."""
    from meanflow.objectives.draws import make_draws as plain

    config = ImprovedMeanFlowConfig(0.5)
    whole = make_draws(config, (1, 2, 2), 3, order_slots(config, range(16), 16), 16)
    half = make_draws(config, (1, 2, 2), 3, order_slots(config, range(8), 16), 16)
    places = [order_slots(config, range(16), 16).index(slot) for slot in order_slots(config, range(8), 16)]
    for name, values in half.cond.items():
        assert torch.equal(whole.cond[name][places], values)
    other = plain(MeanFlowConfig(0.5), (1, 2, 2), 3, order_slots(config, range(16), 16), 16)
    assert torch.equal(other.e, whole.e) and torch.equal(other.t, whole.t) and torch.equal(other.drop, whole.drop)
    assert whole.cond["t_start"][8:].eq(0).all() and whole.cond["t_end"][8:].eq(1).all()
    assert whole.cond["t_start"][:8].max() <= 0.5 <= whole.cond["t_end"][:8].min()


@pytest.mark.parametrize("null_class", ["independent", "flow"])
def test_padding_has_room_for_nearly_every_batch_and_little_more(null_class):
    """Too little would change the shapes of a compiled step, and too much would cost forwards."""
    config = ImprovedMeanFlowConfig(0.5, null_class=null_class)
    slots = order_slots(config, range(64), 64)
    needed = []
    for step in range(300):
        draws = make_draws(config, (1, 1, 1), 0, [slot + 64 * step for slot in slots], 64)
        needed.append(int(draws.guided.acts.sum()))
        assert len(draws.guided.rows) in (32 + num_null(config, 64), 64 + 32)
    assert sum(count > num_null(config, 64) for count in needed) <= 3
    assert max(needed) >= num_null(config, 64) - 6


def test_guidance_evaluates_only_the_rows_that_need_it():
    """Both heads of each half, and for guidance v of r != t rows and the null class's where it acts."""
    config, net, sizes = ImprovedMeanFlowConfig(0.5), TOLD["iMF"](), []
    net.shared_blocks[0].register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    draws = make_draws(config, net.z_shape, 0, order_slots(config, range(16), 16))
    x, y = torch.randn(draws.e.shape), torch.zeros(16).long()
    ImprovedMeanFlow(net, config)(batch_of(x, y, draws))
    assert sizes == [8, 8 + num_null(config, 16), 8]
    again = replace(draws, guided=guided_rows(config, draws.t, draws.drop, draws.cond))
    assert all(torch.equal(a, b) for a, b in zip(again.guided, draws.guided))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"omega_max": 1.0}, "omega_max must be > 1, got 1.0"),
        ({"guidance_scale": 0.5}, "guidance_scale must be >= 1, got 0.5"),
        ({"guidance_interval": (0.6, 0.4)}, "guidance_interval must be a start, and an end that is not before it"),
        ({"class_dropout_prob": 0.0}, "class_dropout_prob must be > 0 with guidance"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ImprovedMeanFlowConfig(**changes)


@pytest.mark.parametrize(
    "net, classes, message",
    [
        (partial(DiT, 4, 2, 3, 32, 2, 2, num_classes=5), 5, "needs a network that takes the CFG scale"),
        (partial(IMF, 4, 2, 3, 32, 2, 2, 1, num_classes=0), 0, "which needs data with classes"),
    ],
)
def test_networks_that_cannot_be_guided_are_refused(net, classes, message):
    with pytest.raises(ValueError, match=message):
        ImprovedMeanFlow.check(ImprovedMeanFlowConfig(), net(), (3, 4, 4), classes)


def test_the_plain_objective_refuses_a_head_that_it_would_not_train():
    """Else DDP ends with a traceback at the second step, and a resume fails."""
    with pytest.raises(ValueError, match="has a v head, which only ImprovedMeanFlow trains: --net v_head 0"):
        MeanFlow.check(MeanFlowConfig(), TOLD["iMF"](), (3, 4, 4), 5)
    MeanFlow.check(MeanFlowConfig(), IMF(4, 2, 3, 32, 2, 2, 1, v_head=False), (3, 4, 4), 5)


def test_weight_decay_spares_the_learned_tokens():
    net = TOLD["iMF"]()
    groups = split_by_decay(ImprovedMeanFlow(net, ImprovedMeanFlowConfig()), [{"params": list(net.parameters())}], 0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert not decayed & {id(net.omega_tokens), id(net.class_tokens), id(net.y_embedder.embedding_table.weight)}
    assert id(net.u_heads[0].mlp.fc2.weight) in decayed


def test_the_default_scale_may_change_when_a_run_resumes():
    """It changes no number that is trained; omega_max does."""
    fields = [
        recipe_fields(TrainConfig(steps=1, objective=ImprovedMeanFlowConfig(**changes)))
        for changes in ({}, {"guidance_scale": 5.0, "guidance_interval": (0.2, 0.8)}, {"omega_max": 6.0})
    ]
    assert different(fields[0], fields[1], FREE_ON_RESUME) == []
    assert [name for name, *_ in different(fields[0], fields[2], FREE_ON_RESUME)] == ["objective.omega_max"]
