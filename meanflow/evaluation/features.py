"""The networks in whose features images are compared: Inception and DINOv2, by torch-fidelity's and timm's code."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from meanflow.config import HUB_ID, check
from meanflow.files import checksum, errors_as


class Inception:
    """The Inception network of FID: pool3, (B, 2048), and the logits without bias, (B, 1008).

    Args:
        path: its weights, as torch-fidelity has them, in a .pth or .safetensors file; None: torch-fidelity's download.
    Raises:
        ValueError: the file does not hold these weights, or there is no download.
    """

    def __init__(self, path: Path | None):
        from timm.models import load_state_dict
        from torch_fidelity import feature_extractor_inceptionv3 as fidelity

        if path is None:
            with errors_as("features: Inception cannot be downloaded: --features inception PATH names a file"):
                torch.hub.load_state_dict_from_url(fidelity.URL_INCEPTION_V3, check_hash=True, weights_only=True)
            path = Path(torch.hub.get_dir(), "checkpoints", Path(fidelity.URL_INCEPTION_V3).name)
        self.sha256, layers = checksum(path), ["2048", "logits_unbiased"]
        with errors_as(f"features: {path} does not hold Inception"), TemporaryDirectory() as folder:
            # torch-fidelity would run what a file holds beside tensors; this copy holds only tensors.
            copy = f"{folder}/inception.pth"
            torch.save(load_state_dict(str(path)), copy)
            self.net = fidelity.FeatureExtractorInceptionV3("inception", layers, copy)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        pooled, logits = self.net.to(images.device)(images)
        return {"inception": pooled, "logits": logits}


class DinoV2:
    """The DINOv2 network of FDD (arXiv:2306.04675): the class token of ViT-L/14 at 224 x 224, (B, 1024).

    Args:
        path: its weights, as timm has them; None: timm's, from the Hub.
    Raises:
        ValueError: the file does not hold these weights, or there is no download.
    """

    NAME = "vit_large_patch14_dinov2.lvd142m"

    def __init__(self, path: Path | None):
        import timm

        options = {"pretrained": True, "img_size": 224, "num_classes": 0}
        options["pretrained_cfg_overlay"] = {"file": str(path)} if path else None
        self.sha256 = checksum(path) if path else None
        with errors_as("features: DINOv2 cannot be loaded: --features dinov2 PATH names a file, as timm has it"):
            self.net = timm.create_model(self.NAME, **options).eval()

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        from torchvision.transforms.functional import normalize

        x = torch.nn.functional.interpolate(images / 255, (224, 224), mode="bicubic", antialias=True)
        return {"dinov2": self.net.to(x.device)(normalize(x, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))}


EXTRACTORS = {"inception": Inception, "dinov2": DinoV2}


def make_extractor(name: str, source: str | None) -> Inception | DinoV2:
    """A network of features.

    Args:
        source: a file of its weights, or one of the Hub, owner/name/file; None: where everybody has them from.
    Raises:
        ValueError: there is no such network or file, or the file holds something else.
    """
    check(name in EXTRACTORS, "features", name, f"one of {', '.join(EXTRACTORS)}, before a file")
    path = Path(source).expanduser() if source else None
    if path is None or path.is_file():
        return EXTRACTORS[name](path)
    hub = re.fullmatch(f"({HUB_ID})/(.+)", source)
    check(hub is not None and not path.parent.exists(), f"features {name}", source, "a file, or owner/name/file")
    from huggingface_hub import hf_hub_download

    with errors_as(f"features: {source} is no file, and the Hub does not give it"):
        return EXTRACTORS[name](Path(hf_hub_download(hub[1], hub[2])))
