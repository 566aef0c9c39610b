"""The autoencoder between images and latents: diffusers' AutoencoderKL, never trained here."""

import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from meanflow.fetch import fetch
from meanflow.files import ensure, errors_as, read_json


def load_vae(name: str) -> AutoencoderKL:
    """The VAE of a folder, a Hub id or ID@REVISION, in float32, frozen.

    Raises:
        ValueError: there is no such folder or repository, or it is no AutoencoderKL.
    """
    with errors_as("vae"):
        folder = fetch(name)
    with errors_as(f"vae: {name} cannot be loaded as an AutoencoderKL"):
        kind = read_json(folder / "config.json").get("_class_name")
        if kind != "AutoencoderKL":
            raise ValueError(f"its config.json is of {kind}")
        vae, info = AutoencoderKL.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"it lacks weights, such as {sorted(info['missing_keys'])[0]}")
    return vae.float().eval().requires_grad_(False)


def fingerprint(vae: AutoencoderKL) -> str:
    """The SHA-256 of the weights, whatever files or precision hold them."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def latent_shape(vae: AutoencoderKL, resolution: int) -> tuple[int, int, int]:
    """(C, H, W) of the latents of square images.

    Raises:
        ValueError: the VAE does not divide the resolution.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    ensure(resolution % factor == 0, f"resolution must be a multiple of the VAE's {factor}, got {resolution}")
    return vae.config.latent_channels, resolution // factor, resolution // factor


def vae_metadata(vae: AutoencoderKL, name: str) -> dict:
    """What a cache notes of its VAE. The revision is the Hub's commit; it is None for a folder."""
    revision = None if Path(name).expanduser().exists() else fetch(name).name  # a snapshot's folder is named by it
    metadata = {"vae": name, "vae_revision": revision, "vae_sha256": fingerprint(vae)}
    return metadata | {option: vae.config[option] for option in ("scaling_factor", "shift_factor")}


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor, batch_size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the posterior, each (B, c, H / f, W / f), for pixels (B, C, H, W) in [-1, 1]."""
    posteriors = [vae.encode(part).latent_dist for part in pixels.split(batch_size)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
    """Pixels, roughly in [-1, 1], for latents that are the VAE's own and not scaled."""
    return torch.cat([vae.decode(part).sample for part in latents.split(batch_size)])
