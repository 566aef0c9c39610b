"""Pictures beside plain samples: from noise to data, a walk between two noises, the nearest training samples."""

import sys
from pathlib import Path

import torch
from torch import Tensor

FRAMES, LAST = 26, 1500  # frames of the way from noise to data, and the milliseconds that the last one stays
PART = 16  # images that the VAE decodes at a time
BAR = 18  # pixels of a label's height


def trajectory(pipe, e: Tensor, y: list[int] | None, steps: int, solver: str, **how) -> list[Tensor]:
    """The states z from the noise e to the sample, one for each step and one more: what the network was given."""
    seen = []
    handle = pipe.net.register_forward_pre_hook(lambda _, given: seen.append(given[0][-len(e) :].float().cpu()))
    try:
        x = pipe(y, len(e), steps, solver=solver, latents=e, output_type="latent", **how).images
    finally:
        handle.remove()
    return [*seen, x.float().cpu()]


@torch.no_grad()
def tiles(pipe, z: Tensor, columns: int):
    """States of the sampler as a picture of PIL's, with their VAE, if they have one; small ones are enlarged."""
    from PIL import Image
    from torchvision.utils import make_grid

    parts = [pipe.to_images(part.to(pipe.device), "pt").float().cpu() for part in z.split(PART)]
    images = torch.cat(parts).clamp(0, 1)
    enlarge = -(-48 // min(images.shape[2:]))
    images = images.repeat_interleave(enlarge, dim=-1).repeat_interleave(enlarge, dim=-2)
    picture = make_grid(images, nrow=columns, pad_value=0.5)
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


def side_by_side(pictures: list, labels: list[str]):
    from PIL import Image, ImageDraw

    width, height = sum(picture.width for picture in pictures) + 12 * (len(pictures) - 1), pictures[0].height + BAR
    whole, place = Image.new("RGB", (width, height), "white"), 0
    draw = ImageDraw.Draw(whole)
    for picture, label in zip(pictures, labels):
        draw.text((place + 4, 3), label, fill="black")
        whole.paste(picture, (place, BAR))
        place += picture.width + 12
    return whole


def write_gif(pipe, out: Path, e: Tensor, y: list[int] | None, steps: int, **how) -> str:
    """From noise to data: one step, which is a straight way, beside so many steps of Euler's method."""
    from tqdm import tqdm

    from meanflow.files import replacing

    noise, sample = trajectory(pipe, e, y, 1, pipe.sampling.solver, **how)
    path = trajectory(pipe, e, y, steps, "euler", **how)
    columns = round(len(e) ** 0.5)
    labels = ["1 step", f"{steps} steps"]
    frames = []
    for number in tqdm(range(FRAMES), desc="frames"):
        share = number / (FRAMES - 1)
        states = noise + share * (sample - noise), path[round(share * steps)]
        frames.append(side_by_side([tiles(pipe, z, columns) for z in states], labels))
    times = [80] * (FRAMES - 1) + [LAST]
    with replacing(out) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=times, loop=0)
    return f"{out}: {len(e)} images from noise to data, 1 step beside {steps} of Euler's method"


def write_walk(pipe, out: Path, seeds: tuple[int, int], classes: list[int], count: int, **how) -> str:
    """A row for each class: the samples of noises on the arc between those of two seeds."""
    e = pipe.walk(*seeds, count)
    rows = [pipe([label] * count, latents=e, output_type="latent", **how).images for label in classes]
    z = torch.cat(rows) if rows else pipe(batch_size=count, latents=e, output_type="latent", **how).images
    save(tiles(pipe, z, count), out)
    return f"{out}: a walk from the noise of seed {seeds[0]} to that of {seeds[1]}, {count} images a row"


def write_neighbours(pipe, out: Path, run: Path, e: Tensor, y: list[int] | None, **how) -> str:
    """Each sample above the training sample that is nearest to it, in the space that the network works in.

    Where the run mirrors samples, the mirror images are compared, too; those of latents are the latents mirrored.
    """
    from tqdm import tqdm

    from meanflow.evaluation.distances import nearest
    from meanflow.evaluation.references import DataReference
    from samples.run_data import data_of_run

    x = pipe(y, len(e), latents=e, output_type="latent", **how).images.float().cpu()
    data, flips = data_of_run(run)
    reference = DataReference(data, pipe.device)
    blocks = [range(len(data))[first : first + 1024] for first in range(0, len(data), 1024)]

    def part(rows: range) -> Tensor:
        return reference.batch(list(rows))[1].float().cpu()

    bar = tqdm(blocks, desc="training samples", unit="block", disable=len(blocks) < 4)
    if flips:  # a sample and its mirror image have the numbers 2 k and 2 k + 1
        both = (torch.stack([rows, rows.flip(-1)], dim=1).flatten(0, 1) for rows in map(part, bar))
        distances, indices = nearest(x.flatten(1), (rows.flatten(1) for rows in both))
        found = [part(range(k // 2, k // 2 + 1)).flip([-1] * (k % 2)) for k in indices.tolist()]
    else:
        distances, indices = nearest(x.flatten(1), (part(rows).flatten(1) for rows in bar))
        found = [part(range(k, k + 1)) for k in indices.tolist()]
    found = torch.cat(found)
    columns = min(len(x), 16)
    padding = torch.zeros(-len(x) % columns, *x.shape[1:])
    rows = [torch.cat([z, padding]).split(columns) for z in (x, found)]
    save(tiles(pipe, torch.cat([row for pair in zip(*rows) for row in pair]), columns), out)
    reach = f"{distances.min():.3g} to {distances.max():.3g}, median {distances.median():.3g}"
    print(f"distance to the nearest of {len(data):,} training samples: {reach}", file=sys.stderr)
    return f"{out}: samples, and under each the training sample that is nearest"


def save(picture, out: Path) -> None:
    from meanflow.files import replacing

    with replacing(out) as temporary:
        picture.save(temporary)
