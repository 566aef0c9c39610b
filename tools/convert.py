"""Converts the weights of another code base into a folder that is sampled, pushed and begun from like our exports.

    python tools/convert.py SiT-XL-2-256.pt --format sit --vae stabilityai/sd-vae-ft-mse --out models/sit-xl
    python tools/convert.py iMF-XL-2.pth --format imf --out models/imf-xl --vae stabilityai/sd-vae-ft-mse
    python tools/sample.py models/imf-xl --classes 207 --cfg-scale 8 --cfg-interval 0.42 0.62 --out dogs.png

And back, for other people's evaluations of a DiT of ours:

    python tools/convert.py runs/ditxl --to meanflow-jax --out ditxl.npz

Every weight is accounted for, in conversion.json: used, unused or missing. What matches only by half is refused. No
code in the file is run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from meanflow.config import check
from meanflow.program import read_flags, refusals

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
license: {license}
tags: [meanflow, {tags}]
---

# {name}

{parameters:,} parameters of [arXiv:{paper}](https://arxiv.org/abs/{paper}), converted from the weights of
[{source}]({source}), whose licence is {license}. Of the {total} tensors in {name} {used} were used; unused: {unused};
missing, so that they are as in a fresh network: {missing}. conversion.json lists them all.

"""
SAMPLED = """Guidance: {guidance}.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS REPOSITORY", trust_remote_code=True)
image = pipe({call}).images[0]
```
"""
BEGUN = "These are weights to begin training from (`--init-from`): samples are noise until then.\n"
TO_BEGIN = ("dit", "edm")  # formats whose networks cannot be sampled before they are trained


@dataclass(frozen=True)
class Options:
    source: tyro.conf.Positional[str]
    """a file of weights: .pt, .pth, .safetensors or .npz; with --to: a run, a checkpoint, an export or Hub id"""
    out: Path
    """the folder to write, in which an exported model is replaced; with --to the file: .npz or .safetensors"""
    format: Literal["imf", "sit", "dit", "zhuyu", "meanflow-jax", "py-meanflow", "edm"] | None = None
    """imf: iMF-{B,M,L,XL}-2.pth of Lyy-iiis/imeanflow; sit: willisma/SiT, exact at r = t; dit: facebookresearch/DiT,
    to begin from; zhuyu: a checkpoint of zhuyu-cs/MeanFlow; meanflow-jax: ema_params of Gsunshine/meanflow as .npz;
    py-meanflow: the U-Net of Gsunshine/py-meanflow; edm: the U-Net of NVlabs/edm as .safetensors, to begin from"""
    to: Literal["meanflow-jax", "sit"] | None = None
    """write a DiT of ours as others read it. meanflow-jax: exact, .npz; sit: u(z, t, t, y) in SiT's direction of time,
    .safetensors"""
    vae: str | None = None
    """folder, Hub id or ID@REVISION of the AutoencoderKL that decodes the latents; default: none, so that samples are
    latents"""
    input_size: int | None = None
    """height and width of the latents; default: what the file tells, or 32"""
    num_heads: int | None = None
    """heads of the attention of a DiT; default: what the DiT of this width has"""

    def __post_init__(self) -> None:
        for name in ("input_size", "num_heads"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "> 0")
        check((self.format is None) != (self.to is None), "format", self.format, "given, or --to instead of it")
        is_alone = (self.vae, self.input_size, self.num_heads) == (None, None, None)
        check(self.to is None or is_alone, "vae, input_size and num_heads", "one", "left out with --to")
        endings = {"meanflow-jax": ".npz", "sit": ".safetensors"}
        fits = self.to is None or self.out.suffix == endings[self.to]
        check(fits, "out", self.out, f"a file that ends with {endings.get(self.to)}")


def main(options: Options) -> None:
    from importers import dit, edm, imf, meanflow_jax, py_meanflow, sit, zhuyu

    modules = {"imf": imf, "sit": sit, "dit": dit, "zhuyu": zhuyu, "meanflow-jax": meanflow_jax}
    modules |= {"py-meanflow": py_meanflow, "edm": edm}
    if options.to is not None:
        write_back(options, modules[options.to])
    else:
        write_export(options, modules[options.format])


def write_export(options: Options, importer) -> None:
    from importers.common import read
    from meanflow.data.vae import load_vae
    from meanflow.files import ensure, errors_as, write_json
    from meanflow.publishing.export import export_folder
    from meanflow.publishing.pipeline import MeanFlowPipeline

    source = Path(options.source).expanduser()
    ensure(source.is_file(), f"{source} is no file")
    content = read(source)
    with errors_as(f"{source} cannot be converted as {options.format}"):
        found = importer.convert(content, options.input_size, options.num_heads)
    fate = {name: getattr(found, name) for name in ("used", "unused", "missing")}
    said = {name: f"{len(keys)}, such as {keys[0]}" if keys else "none" for name, keys in fate.items()}
    for name, words in said.items():
        fresh = " (these are as in a fresh network)" if name == "missing" and found.missing else ""
        print(f"{name}: {words}{fresh}")
    ensure(options.vae is None or found.latents is not None, f"vae: {source} is of pixels, and needs none")
    vae = load_vae(options.vae) if options.vae else None
    net, sampling, channels = found.net, found.sampling, found.net.z_shape[0]
    is_its = vae is None or vae.config.latent_channels == channels
    ensure(is_its, f"vae: {options.vae} has not the {channels} channels of these latents")
    classes = dict(enumerate(class_names(net.config.num_classes)))
    pipe = MeanFlowPipeline(net.eval(), vae, sampling._asdict(), classes, found.latents)
    total = len(found.used) + len(found.unused)
    is_begun = options.format in TO_BEGIN
    about = {"license": importer.LICENSE, "source": importer.SOURCE, "paper": importer.PAPER, "name": source.name}
    about |= {**said, "parameters": net.num_parameters(), "total": total, "used": len(found.used)}
    kind = "flow-matching" if sampling.solver == "euler" else "one-step"
    about |= {"tags": "initialisation" if is_begun else kind, "guidance": sampling.guidance}
    scale = f", guidance_scale={sampling.guidance_scale:g}" if sampling.guidance_scale else ""
    about["call"] = f"class_labels=[0]{scale}" if classes else "batch_size=1"
    with export_folder(options.out.expanduser()) as folder:
        pipe.save_pretrained(folder)
        write_json(folder / "conversion.json", fate)
        (folder / "README.md").write_text((CARD + (BEGUN if is_begun else SAMPLED)).format(**about))
    print(f"{options.out}: a pipeline for diffusers, README.md and conversion.json")


def class_names(count: int) -> list[str]:
    """The names of ImageNet's 1,000 classes, in the order that all of these projects use; else numbers."""
    from torchvision.models import ResNet50_Weights

    return ResNet50_Weights.IMAGENET1K_V1.meta["categories"] if count == 1000 else [str(k) for k in range(count)]


def write_back(options: Options, importer) -> None:
    import numpy as np
    from safetensors.torch import save_file

    from meanflow.files import ensure, replacing
    from meanflow.publishing.checkpoints import load_pipeline
    from models.dit import DiT

    pipe = load_pipeline(options.source)
    net, is_u = pipe.net, pipe.sampling.prediction == "u"
    fits = isinstance(net, DiT) and len(net.z_shape) == 3 and net.config.num_classes and not net.takes_omega and is_u
    what = "a DiT of images with classes that returns u and is told no CFG scale"
    ensure(fits, f"{options.source} must be {what}: other networks have no place in {options.to}")
    weights, lost = importer.revert(net)
    out = options.out.expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        if out.suffix == ".npz":
            np.savez(temporary, **{path: value.numpy() for path, value in weights.items()})
        else:
            save_file(weights, temporary)
    print(f"{out}: {len(weights)} tensors. {lost}")


if __name__ == "__main__":
    with refusals():
        main(read_flags(Options))
