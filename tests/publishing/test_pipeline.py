"""MeanFlowPipeline: sampling in diffusers' words, and what a scale or a solver cannot mean."""

import json

import pytest
import torch
from conftest import TOLD, small_dit
from diffusers import AutoencoderKL, DiffusionPipeline

from meanflow.config import ImprovedMeanFlowConfig, MeanFlowConfig
from meanflow.objectives.improved import ImprovedMeanFlow
from meanflow.objectives.meanflow import MeanFlow
from meanflow.publishing.pipeline import OF_GUIDANCE, MeanFlowPipeline
from meanflow.sampler import average_velocity, cfg, euler, rk4, sample

NAMES = dict(enumerate(["tench, Tinca tinca", "cat", "dog", "eel", "fox"]))


def pipeline(vae=None, latents=None, num_classes=5, **objective) -> MeanFlowPipeline:
    net = small_dit(in_channels=3 if vae is None else 4, num_classes=num_classes)
    names = NAMES if num_classes else {}
    pipe = MeanFlowPipeline(net.eval(), vae, MeanFlow.sampling(MeanFlowConfig(**objective))._asdict(), names, latents)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_images_are_those_of_the_sampler():
    pipe, y = pipeline(), torch.tensor([1, 0, 4])
    e = pipe.noise(0, range(3))
    with torch.no_grad():
        x = sample(lambda z, t, r: average_velocity(pipe.net, z, t, r, {"y": y}), e, 2)
    how = {"class_labels": ["cat", "Tinca tinca", 4], "latents": e, "num_inference_steps": 2}
    assert torch.equal(pipe(**how, output_type="latent").images, x)
    pixels = (x / 2 + 0.5).clamp(0, 1)
    assert torch.equal(pipe(**how, output_type="pt").images, pixels)
    array = pipe(**how, output_type="np").images
    assert array.shape == (3, 4, 4, 3) and (array == pixels.permute(0, 2, 3, 1).numpy()).all()
    picture = pipe(**how).images[1]
    assert picture.size == (4, 4) and picture.getpixel((2, 1)) == tuple((array[1, 1, 2] * 255).round().astype(int))
    (same,) = pipe(**how, output_type="latent", return_dict=False)
    assert torch.equal(same, x)


def test_latents_go_through_the_vae_in_its_own_units(vae):
    """z = (latent - shift) * scale, per channel."""
    autoencoder = AutoencoderKL.from_pretrained(vae).eval()
    shift, scale = [0.1, 0.2, 0.3, 0.4], [2.0, 3.0, 4.0, 5.0]
    pipe = pipeline(autoencoder, {"shift": shift, "scale": scale})
    e = pipe.noise(0, range(1))
    z = pipe([1], latents=e, output_type="latent").images
    with torch.no_grad():
        x = autoencoder.decode(z / torch.tensor(scale).view(-1, 1, 1) + torch.tensor(shift).view(-1, 1, 1)).sample
    torch.testing.assert_close(pipe([1], latents=e, output_type="pt").images, (x / 2 + 0.5).clamp(0, 1))


def test_generators_draw_the_noise_as_elsewhere_in_diffusers():
    """One for all, which goes on; or one an image, by which an image does not depend on the others."""
    pipe = pipeline()
    one = torch.Generator().manual_seed(3)
    first, second = (pipe([1, 1], generator=one, output_type="latent").images for _ in range(2))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)
    many = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
    both = pipe([1, 2], generator=many, output_type="latent").images
    alone = pipe([2], generator=torch.Generator().manual_seed(8), output_type="latent").images
    torch.testing.assert_close(both[1], alone[0])
    with pytest.raises(ValueError, match="generator must be one, or 3, got 2"):
        pipe([1, 2, 3], generator=many)


def test_guidance_while_sampling_is_cfg_and_solvers_are_the_samplers():
    pipe, y = pipeline(), torch.tensor([1, 2])
    e = pipe.noise(0, range(2))

    def u_fn(z, t, r, cond={"y": y}):  # noqa: B006
        return average_velocity(pipe.net, z, t, r, cond)

    guided = pipe([1, 2], latents=e, guidance_scale=3.0, output_type="latent").images
    torch.testing.assert_close(guided, sample(cfg(u_fn, {"y": y}, 5, 3.0), e))
    ode = pipe([1, 2], latents=e, solver="rk4", num_inference_steps=3, output_type="latent").images
    torch.testing.assert_close(ode, rk4(u_fn, e, 3))
    guided = pipe([1, 2], latents=e, solver="euler", num_inference_steps=3, guidance_scale=2, output_type="latent")
    torch.testing.assert_close(guided.images, euler(cfg(u_fn, {"y": y}, 5, 2.0), e, 3))


def test_network_without_classes_takes_a_batch_size():
    pipe = pipeline(num_classes=0)
    assert pipe(batch_size=3, output_type="np").images.shape == (3, 4, 4, 3)
    with pytest.raises(ValueError, match="class_labels must not be given"):
        pipe([1])
    with pytest.raises(ValueError, match="guidance_scale 2 needs classes, and this network has none: leave it out"):
        pipe(guidance_scale=2.0)
    with pytest.raises(ValueError, match="class_labels must be given"):
        pipeline()()


@pytest.mark.parametrize(
    "objective, how, message",
    [
        ({"omega": 0.2, "kappa": 0.92}, {"guidance_scale": 4.0}, "trained into this network, at scale 2.5, and costs"),
        (
            {"class_dropout_prob": 0.0},
            {"guidance_scale": 4.0},
            "never trained here .class_dropout_prob 0.: leave it out",
        ),
        ({"null_class": "flow"}, {"guidance_scale": 4.0}, "only at r = t .null_class flow.: leave it out, or"),
        (
            {"meanflow_ratio": 0.0},
            {"solver": "meanflow"},
            "meanflow cannot sample a network of plain flow matching: use euler with 50",
        ),
        ({}, {"solver": "dopri"}, "solver must be one of meanflow, euler, heun, rk4, got dopri"),
    ],
)
def test_scale_or_solver_that_cannot_mean_what_one_hopes_is_refused(objective, how, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**objective)([1], **how)


def test_scale_that_was_trained_in_costs_nothing():
    pipe = pipeline(omega=0.2, kappa=0.92)
    assert pipe.config.sampling["guidance_scale"] == pytest.approx(2.5)
    e = pipe.noise(0, range(1))
    plain, same = (pipe([1], latents=e, guidance_scale=s, output_type="latent").images for s in (None, 2.5))
    assert torch.equal(plain, same)


TOLD_BY = ImprovedMeanFlowConfig(guidance_scale=3.0, guidance_interval=(0.2, 0.9))


def told_pipeline(name: str) -> MeanFlowPipeline:
    """Of a network that is told the CFG scale."""
    pipe = MeanFlowPipeline(TOLD[name]().eval(), None, ImprovedMeanFlow.sampling(TOLD_BY)._asdict(), NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", TOLD)
def test_a_network_is_told_the_scale_and_the_interval_in_one_evaluation(name):
    """Those that are asked for, or else the checkpoint's; at scale 1, the middle of the intervals that were trained."""
    pipe, calls, y = told_pipeline(name), [], torch.tensor([1, 2])
    e, one = pipe.noise(0, range(2)), torch.ones(2)
    for scale, interval in ((None, None), (4.0, (0.4, 0.6)), (1.0, None)):
        default = (0.25, 0.75) if scale == 1 else (0.2, 0.9)
        told = {"omega": scale or 3.0, **dict(zip(("t_start", "t_end"), interval or default))}
        cond = {"y": y, **{name: value * one for name, value in told.items()}}
        with torch.no_grad():
            expected = e - pipe.net(e, one, one, **cond)
        hook = pipe.net.register_forward_hook(lambda *_: calls.append(1))
        how = {"guidance_scale": scale, "guidance_interval": interval, "output_type": "latent"}
        images = pipe([1, 2], latents=e, **how).images
        hook.remove()
        torch.testing.assert_close(images, expected)
    assert len(calls) == 3
    assert not torch.equal(*(pipe([1], latents=e[:1], guidance_scale=s, output_type="latent").images for s in (1, 4)))


def test_ode_solvers_ask_for_the_velocity_that_was_trained():
    """v, at r = t, was trained with the interval [0, 1]: outside of the interval asked for, it is v of scale 1."""
    pipe, seen = told_pipeline("DiT, omega"), []

    def note(module, args, kwargs) -> None:
        seen.append([round(float(value[0]), 4) for value in (args[1], *(kwargs[n] for n in sorted(OF_GUIDANCE)))])

    pipe.net.register_forward_pre_hook(note, with_kwargs=True)
    pipe([1], solver="euler", num_inference_steps=4, guidance_scale=5.0, guidance_interval=(0.3, 0.8))
    assert seen == [[1.0, 1.0, 1.0, 0.0], [0.75, 5.0, 1.0, 0.0], [0.5, 5.0, 1.0, 0.0], [0.25, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    "how, message",
    [
        ({"guidance_scale": 0.5}, "guidance_scale 0.5 must be >= 1, which is no guidance"),
        ({"guidance_interval": (0.6, 0.4)}, "guidance_interval must be times 0 <= start <= end <= 1, got 0.6 0.4"),
    ],
)
def test_scale_and_interval_that_cannot_be_told_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        told_pipeline("DiT, omega")([1], **how)
    with pytest.raises(ValueError, match="guidance_interval is for networks that are told the CFG scale"):
        pipeline()([1], guidance_interval=(0.2, 0.8))


def test_scale_outside_of_what_was_trained_is_sampled_and_said(caplog):
    pipe = told_pipeline("DiT, omega")
    assert pipe([1], guidance_scale=10.5, output_type="pt").images.isfinite().all()
    assert "guidance_scale 10.5 is outside of what was trained, 1 to 8" in caplog.text
    pipe([1], guidance_interval=(0.6, 0.9), output_type="pt")
    assert "guidance_interval 0.6 0.9 is outside of what was trained, which holds 0.5" in caplog.text


def test_flow_matching_network_is_sampled_by_euler():
    """Without being asked; its best settings are in its config."""
    pipe = pipeline(meanflow_ratio=0.0)
    best = {"solver": "euler", "num_inference_steps": 50, "guidance_scale": None}
    assert pipe.config.sampling.items() >= best.items()
    e = pipe.noise(0, range(1))
    euler50 = pipe([1], latents=e, solver="euler", num_inference_steps=50, output_type="latent").images
    assert torch.equal(pipe([1], latents=e, output_type="latent").images, euler50)


def test_null_class_at_r_equal_t_serves_the_ode_solvers():
    pipe = pipeline(null_class="flow")
    assert pipe([1], solver="euler", num_inference_steps=2, guidance_scale=4.0).images


def test_name_of_two_classes_is_refused_with_both():
    pipe = pipeline()
    pipe.id2label |= {3: "crane, bird", 4: "crane, lifting"}
    with pytest.raises(ValueError, match="several classes are 'crane': is it 3, 'crane, bird' or 4, 'crane, lifting'"):
        pipe.class_ids(["crane"])
    assert pipe.class_ids(["bird", "crane, lifting", "tench"]) == [3, 4, 0]


@pytest.mark.parametrize(
    "label, message",
    [("catt", "no class 'catt': is it 'cat'?"), (5, "class must be in .0, 5., got 5"), (-1, "got -1"), ("7", "got 7")],
)
def test_class_that_is_none_is_refused_with_what_is_near(label, message):
    with pytest.raises(ValueError, match=message):
        pipeline()([label])


def test_wrong_noise_is_refused():
    with pytest.raises(ValueError, match=r"latents must be \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"):
        pipeline()([1, 2], latents=torch.zeros(1, 3, 4, 4))


def test_saved_pipeline_loads_by_diffusers_alone_and_saves_again(vae, tmp_path):
    """With its own code, and no word of where it lay."""
    autoencoder = AutoencoderKL.from_pretrained(vae).eval()
    pipe = pipeline(autoencoder, {"shift": 0.0, "scale": 0.5}, omega=2.0)
    e = pipe.noise(0, range(2))
    expected = pipe([1, "dog"], latents=e, output_type="pt").images
    pipe.save_pretrained(tmp_path / "a")
    for there, then in (("a", "b"), ("b", "c")):
        loaded = DiffusionPipeline.from_pretrained(tmp_path / there, trust_remote_code=True)
        assert type(loaded).__module__.startswith("diffusers_modules") and "models" not in type(loaded.net).__module__
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(loaded([1, "dog"], latents=loaded.noise(0, range(2)), output_type="pt").images, expected)
        loaded.save_pretrained(tmp_path / then)
    for path in tmp_path.rglob("*.json"):
        assert "_name_or_path" not in path.read_text() and str(tmp_path) not in path.read_text()
    assert json.loads((tmp_path / "c/model_index.json").read_text())["net"] == ["modeling_dit", "DiT"]


def test_offloading_and_moving_work():
    pipe = pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    assert len(pipe([1, 2]).images) == 2
    half = pipeline().to(torch.float64)
    assert len(half([1, 2]).images) == 2


def test_bfloat16_is_near_float32():
    """To 2 % of the largest entry, of weights that make u of the size of the noise."""
    pipe, half = pipeline(), pipeline()
    torch.nn.Module.to(half.net, torch.bfloat16)
    e = pipe.noise(0, range(8))
    a, b = (p([1] * 8, latents=e, output_type="latent").images for p in (pipe, half))
    assert b.dtype == torch.float32 and (a - b).abs().max() < 0.02 * a.abs().max()
