"""MeanFlowPipeline: a trained network, its VAE and what sampling has to know, in diffusers' own words.

A copy of this file travels with every published model, beside sampler.py and noise.py and the network's own file.
"""

import difflib
import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from .noise import noise
from .sampler import SOLVERS, STEPS, average_velocity, cfg


class MeanFlowPipeline(DiffusionPipeline):
    """pipe(class_labels=["cat", 3]).images: one-step samples.

    Args:
        net: net(z, t, h, y) -> u, with a sample's shape in z_shape and num_classes in its config.
        vae: an AutoencoderKL, None for pixels.
        objective: what it was trained by, the fields of meanflow's MeanFlowConfig.
        id2label: names of the classes.
        latents: {"shift", "scale"}, a number or one a channel: z = (latent - shift) * scale.
        sampling: the solver and num_inference_steps that are best, and the guidance_scale trained in, None if none was.
    """

    model_cpu_offload_seq = "net->vae"
    _optional_components = ["vae"]

    def __init__(self, net, vae=None, objective=None, id2label=None, latents=None, sampling=None):
        super().__init__()
        self.register_modules(net=net, vae=vae)
        self.objective = SimpleNamespace(**objective)
        self.id2label = {int(index): name for index, name in (id2label or {}).items()}
        facts = {"objective": objective, "id2label": id2label or {}, "latents": latents}
        self.register_to_config(**facts, sampling=sampling or self.best())
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    def best(self) -> dict:
        """What `sampling` says of a network of this objective."""
        solver = "meanflow" if self.objective.meanflow_ratio else "euler"
        omega, kappa = self.objective.omega, self.objective.kappa
        scale = None if (omega, kappa) == (1, 0) else omega / (1 - kappa)
        return {"solver": solver, "num_inference_steps": STEPS[solver], "guidance_scale": scale}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample as the network sees it, (C, *S)."""
        return self.net.z_shape

    def noise(self, seed: int, indices) -> Tensor:
        """Noise to pass as latents; image k's depends on (seed, k) alone, so not on the batch it is in."""
        return noise(seed, indices, self.shape)

    def class_ids(self, labels) -> list[int]:
        """The classes of names or indices.

        Raises:
            ValueError: one is no class; the message names it and what is near.
        """
        names, num_classes, ids = {}, self.net.config.num_classes, []
        for index, label in self.id2label.items():
            for name in {label, *label.split(", ")}:
                names.setdefault(name, []).append(index)
        for label in [labels] if isinstance(labels, (int, str)) else labels:
            found = names.get(label, [int(label)] if isinstance(label, int) or label.isdecimal() else [])
            if len(found) != 1:
                near = [f"{index}, {self.id2label[index]!r}" for index in found]
                near = near or list(map(repr, difflib.get_close_matches(label, names, n=3)))
                hint = f": is it {' or '.join(near)}?" if near else ""
                raise ValueError(f"{'several classes are' if found else 'no class'} {label!r}{hint}")
            if not 0 <= found[0] < num_classes:
                raise ValueError(f"class must be in [0, {num_classes}), got {found[0]}")
            ids += found
        return ids

    def check_choice(self, solver: str, guidance_scale: float | None) -> None:
        """Raises a ValueError where a solver or a scale cannot mean what one hopes; it says what to do instead."""
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver}")
        if solver == "meanflow" and self.objective.meanflow_ratio == 0:
            raise ValueError("solver meanflow cannot sample a network of plain flow matching: use euler with 50 steps")
        if guidance_scale is None:
            return
        trained, scale = self.config.sampling["guidance_scale"], f"guidance_scale {guidance_scale:g}"
        if not self.net.config.num_classes:
            raise ValueError(f"{scale} needs classes, and this network has none: leave it out")
        if trained is not None and abs(guidance_scale - trained) > 1e-3 * trained:
            fact = f"guidance is trained into this network, at scale {trained:.4g}, and costs nothing"
            advice = "leave it out, or train with another omega or kappa"
            raise ValueError(f"{fact}; {guidance_scale:g} cannot be had by sampling: {advice}")
        if trained is not None or guidance_scale == 1:
            return
        if self.objective.class_dropout_prob == 0:
            fact = "which this network never learned (class_dropout_prob 0)"
            raise ValueError(f"{scale} needs the null class, {fact}: leave it out")
        if solver == "meanflow" and self.objective.null_class == "flow":
            fact = "which this network learned at r = t alone (null_class flow)"
            advice = "leave it out, or use solver euler with 50 steps"
            raise ValueError(f"{scale} needs the null class at r < t, {fact}: {advice}")

    @torch.no_grad()
    def __call__(
        self,
        class_labels=None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        solver: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Samples an image for each of class_labels; batch_size images without classes.

        Args:
            class_labels: indices or names, or one of them.
            num_inference_steps: default: 1 by MeanFlow; euler 50, heun 25, rk4 12.
            guidance_scale: classifier-free guidance while sampling, two evaluations a step; None: none but what was
                trained in.
            solver: meanflow, or an ODE solver for the instantaneous velocity: euler, heun, rk4; default: the best.
            latents: the noise, (B, C, *S); default: drawn by the generator, or one generator an image.
            output_type: pil; np, (B, H, W, C), or pt, (B, C, H, W), in [0, 1]; or latent, as the network makes them.
                Volumes come as the network makes them, np by default, (B, C, D, H, W).
        Raises:
            ValueError: a class, shape, solver or scale that cannot be.
        """
        solver = solver or self.config.sampling["solver"]
        self.check_choice(solver, guidance_scale)
        num_inference_steps = STEPS[solver] if num_inference_steps is None else num_inference_steps
        num_classes = self.net.config.num_classes
        if (class_labels is None) == (num_classes > 0):
            must = "must" if num_classes else "must not"
            raise ValueError(f"class_labels {must} be given: the network has {num_classes} classes")
        device = self._execution_device
        y = None if class_labels is None else torch.tensor(self.class_ids(class_labels), device=device)
        shape = (batch_size if y is None else len(y), *self.shape)
        if latents is None:
            many = generator if isinstance(generator, list) else [generator] * shape[0]
            if len(many) != shape[0]:
                raise ValueError(f"generator must be one, or {shape[0]}, got {len(many)}")
            draws = [torch.randn(self.shape, generator=g, device=g.device if g else "cpu") for g in many]
            latents = torch.stack([draw.to(device) for draw in draws])
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
        trained = self.config.sampling["guidance_scale"] is not None
        scale = 1.0 if guidance_scale is None or trained else guidance_scale

        with self.progress_bar(total=num_inference_steps * {"heun": 2, "rk4": 4}.get(solver, 1)) as bar:

            def net(z: Tensor, t: Tensor, h: Tensor, y: Tensor | None) -> Tensor:
                bar.update()
                return self.net(z.to(self.net.dtype), t, h, y)

            def u_fn(z: Tensor, t: Tensor, r: Tensor, y: Tensor | None = y) -> Tensor:
                return average_velocity(net, self.objective, z, t, r, y)

            guided = u_fn if scale == 1 else cfg(u_fn, y, num_classes, scale)
            z = SOLVERS[solver](guided, latents.to(device, torch.float32), num_inference_steps)
        images = self.to_images(z, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def to_images(self, z: Tensor, output_type: str):
        if output_type != "latent" and self.vae is not None:
            facts = self.config.latents
            shift, scale = (torch.tensor(facts[a], device=z.device).view(-1, 1, 1) for a in ("shift", "scale"))
            z = self.vae.decode((z / scale + shift).to(self.vae.dtype)).sample
        if z.ndim == 5:
            return z.float().cpu().numpy() if output_type in ("pil", "np") else z.float()
        return self.image_processor.postprocess(z.float(), output_type)

    def save_pretrained(self, save_directory, **options) -> None:
        """As diffusers does, with the code, so that from_pretrained(..., trust_remote_code=True) needs no project."""
        super().save_pretrained(save_directory, **options)
        folder, here, network = Path(save_directory), Path(__file__), Path(inspect.getfile(type(self.net)))
        name = f"modeling_{network.stem.removeprefix('modeling_')}"  # diffusers has pipelines of names like dit
        code = {file: here.with_name(file) for file in ("sampler.py", "noise.py")}
        for target, source in {**code, "pipeline_meanflow.py": here, f"net/{name}.py": network}.items():
            shutil.copyfile(source, folder / target)
        for path in (folder / "model_index.json", *folder.glob("*/config.json")):
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)  # where it lay on this machine
            if path.parent == folder:
                config["_class_name"] = ["pipeline_meanflow", type(self).__name__]
                config["net"] = [name, type(self.net).__name__]
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
