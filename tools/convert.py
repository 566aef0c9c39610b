"""Converts the weights of another code base into a folder that is sampled, pushed and begun from like our exports.

    python tools/convert.py iMF-XL-2.pth --format imf --out models/imf-xl --vae stabilityai/sd-vae-ft-mse
    python tools/sample.py models/imf-xl --classes 207 --cfg-scale 8 --cfg-interval 0.42 0.62 --out dogs.png

Every weight is accounted for: used, unused or missing. What matches only by half is refused.
"""

import sys
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
tags: [meanflow, one-step, class-conditional]
---

# {name}

{parameters:,} parameters of [arXiv:{paper}](https://arxiv.org/abs/{paper}), converted from the official weights of
[{source}]({source}), whose licence is {license}. Of the {total} tensors in {name} {used} were used; unused: {unused}.

Guidance: {guidance}.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS REPOSITORY", trust_remote_code=True)
image = pipe(class_labels=[0], guidance_scale={scale:g}).images[0]
```
"""


@dataclass(frozen=True)
class Options:
    source: tyro.conf.Positional[Path]
    """the file with the weights"""
    format: Literal["imf"]
    """imf: iMF-{B,M,L,XL}-2.pth of Lyy-iiis/imeanflow, or a .safetensors file with the same names"""
    out: Path
    """the folder to write; an exported model there is replaced"""
    vae: str | None = None
    """folder, Hub id or ID@REVISION of the AutoencoderKL that decodes the latents; default: none, so that samples are
    latents"""
    input_size: int = 32
    """height and width of the latents"""

    def __post_init__(self) -> None:
        check(self.input_size > 0, "input_size", self.input_size, "> 0")


def main(options: Options) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from importers import imf

    from meanflow.data.vae import load_vae
    from meanflow.files import ensure
    from meanflow.publishing.export import export_folder
    from meanflow.publishing.pipeline import MeanFlowPipeline

    source = options.source.expanduser()
    ensure(source.is_file(), f"{source} is no file")
    weights = imf.read(source)
    net, sampling, latents, fate = imf.convert(weights, options.input_size)
    for name, keys in fate.items():
        print(f"{name}: {len(keys)}{f', such as {keys[0]}' if keys else ''}")
    vae = load_vae(options.vae) if options.vae else None
    channels = net.z_shape[0]
    is_its = vae is None or vae.config.latent_channels == channels
    ensure(is_its, f"vae: {options.vae} has not the {channels} channels of these latents")
    classes = {index: str(index) for index in range(net.config.num_classes)}
    pipe = MeanFlowPipeline(net.eval(), vae, sampling._asdict(), classes, latents)
    about = {"license": imf.LICENSE, "source": imf.SOURCE, "paper": imf.PAPER, "name": source.name}
    about |= {"parameters": net.num_parameters(), "total": len(weights), "used": len(fate["used"])}
    unused = fate["unused"]
    about |= {"unused": f"{len(unused)}, such as {unused[0]}" if unused else "none", "guidance": sampling.guidance}
    with export_folder(options.out.expanduser()) as folder:
        pipe.save_pretrained(folder)
        (folder / "README.md").write_text(CARD.format(**about, scale=sampling.guidance_scale))
    print(f"{options.out}: a pipeline for diffusers and README.md")


if __name__ == "__main__":
    with refusals():
        main(read_flags(Options))
