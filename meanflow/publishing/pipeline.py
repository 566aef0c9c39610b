"""MeanFlowPipeline: a trained network, its VAE and what sampling has to know, in diffusers' own words.

A copy of this file travels with every published model, beside sampler.py, noise.py and the network's own file.
"""

import difflib
import inspect
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from meanflow.noise import arc, noise
from meanflow.sampler import SOLVERS, STEPS, average_velocity, cfg, ensure, guidance_conditions, usual_interval

logger = logging.get_logger(__name__)
OF_GUIDANCE = {"omega", "t_start", "t_end"}  # conditions that guidance_scale and guidance_interval stand for


class MeanFlowPipeline(DiffusionPipeline):
    """pipe(class_labels=["cat", 3]).images: one-step samples.

    Args:
        net: net(z, t, h, **cond), with a sample's shape in z_shape and num_classes in its config.
        vae: an AutoencoderKL; None for pixels.
        sampling: how the network is sampled, the fields of meanflow's `Sampling`: prediction, t_min, solver,
            num_inference_steps, guidance_scale, null_class, guidance, guidance_range, guidance_interval.
        id2label: names of the classes.
        latents: {"shift", "scale"}, each one number or one for each channel: z = (latent - shift) * scale.
    """

    model_cpu_offload_seq = "net->vae"
    _optional_components = ["vae"]

    def __init__(self, net, vae=None, sampling=None, id2label=None, latents=None):
        super().__init__()
        self.register_modules(net=net, vae=vae)
        newer = {"guidance_range": None, "guidance_interval": None}  # than version 0.1
        self.sampling = SimpleNamespace(**{**newer, **sampling})
        self.said = set()  # warnings
        self.id2label = {int(index): name for index, name in (id2label or {}).items()}
        self.register_to_config(sampling=sampling, id2label=id2label or {}, latents=latents)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def num_classes(self) -> int:
        return self.net.config.get("num_classes", 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample as the network sees it, (C, *S)."""
        return self.net.z_shape

    def noise(self, seed: int, indices) -> torch.Tensor:
        """Noise to pass as latents; image k's depends only on (seed, k), and not on the batch that it is in."""
        return noise(seed, indices, self.shape)

    def walk(self, first: int, last: int, count: int) -> torch.Tensor:
        """Noise to pass as latents, on the arc from that of one seed to that of another; image 0's of both."""
        a, b = (self.noise(seed, [0])[0] for seed in (first, last))
        return torch.stack([arc(a, b, step / max(1, count - 1)) for step in range(count)])

    def class_ids(self, labels) -> list[int]:
        """The classes of names or indices.

        Raises:
            ValueError: one is no class; the message names it and what is near.
        """
        names, ids = {}, []
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
            ensure(0 <= found[0] < self.num_classes, f"class must be in [0, {self.num_classes}), got {found[0]}")
            ids += found
        return ids

    def check_choice(self, solver: str, guidance_scale: float | None, guidance_interval=None) -> None:
        """Raises a ValueError where a solver or a scale cannot mean what one hopes; it says what to do instead."""
        ensure(solver in SOLVERS, f"solver must be one of {', '.join(SOLVERS)}, got {solver}")
        if solver == "meanflow" and self.sampling.solver != "meanflow":
            raise ValueError("solver meanflow cannot sample a network of plain flow matching: use euler with 50 steps")
        if guidance_interval is not None:
            is_told = self.sampling.guidance_range is not None
            ensure(is_told, "guidance_interval is for networks that are told the CFG scale, and this one is not")
            start, end = guidance_interval
            ensure(0 <= start <= end <= 1, f"guidance_interval must be times 0 <= start <= end <= 1, got {start} {end}")
            if not start <= 0.5 <= end:
                self.warn(f"guidance_interval {start:g} {end:g} is outside of what was trained, which holds 0.5")
        if guidance_scale is None:
            return
        trained, scale = self.sampling.guidance_scale, f"guidance_scale {guidance_scale:g}"
        ensure(0 <= guidance_scale < math.inf, f"{scale} must be a finite number >= 0")
        if self.sampling.guidance_range is not None:
            least, most = self.sampling.guidance_range
            ensure(guidance_scale >= least, f"{scale} must be >= {least:g}, which is no guidance")
            if guidance_scale > most:
                self.warn(f"{scale} is outside of what was trained, {least:g} to {most:g}")
            return
        ensure(self.num_classes > 0, f"{scale} needs classes, and this network has none: leave it out")
        if trained is not None and abs(guidance_scale - trained) > 1e-3 * trained:
            fact = f"guidance is trained into this network, at scale {trained:.4g}, and costs nothing"
            raise ValueError(f"{fact}; {guidance_scale:g} cannot be had by sampling: leave it out, or train with it")
        if trained is not None or guidance_scale == 1:
            return
        if self.sampling.null_class is None:
            raise ValueError(f"{scale} needs the null class, never trained here (class_dropout_prob 0): leave it out")
        if solver == "meanflow" and self.sampling.null_class == "flow":
            fact = f"{scale} needs the null class at r < t, which was trained only at r = t (null_class flow)"
            raise ValueError(f"{fact}: leave it out, or use solver euler with 50 steps")

    def warn(self, words: str) -> None:
        """Warns once."""
        if words not in self.said:
            self.said.add(words)
            logger.warning(words)

    def condition_names(self, required: bool = False) -> list[str]:
        """The conditions beside the class that the network takes, or only those that it cannot do without."""
        parameters = list(inspect.signature(self.net.forward).parameters.values())[3:]  # without z, t and h
        is_told = hasattr(self.net, "takes_omega")
        named = [p for p in parameters if p.name not in {"y", *(OF_GUIDANCE if is_told else ())}]
        return [p.name for p in named if p.default is p.empty or not required]

    def conditions(self, class_labels, cond: dict | None, batch_size: int) -> dict[str, torch.Tensor]:
        """What goes to the network by keyword, each (B, ...), on the pipeline's device.

        Args:
            class_labels: indices or names, None without classes.
            cond: further conditions by name, each one value for every image or a single one for all.
        Raises:
            ValueError: the network takes no such condition, or one is missing or is not one value for each image.
        """
        device, known = self._execution_device, self.condition_names()
        given = {name: torch.atleast_1d(torch.as_tensor(value, device=device)) for name, value in (cond or {}).items()}
        for name, value in given.items():
            ensure(name in known, f"cond {name} is not known to this network, which takes {', '.join(known) or 'none'}")
            if len(value) not in (1, batch_size):
                raise ValueError(f"cond {name} must be 1 value, or {batch_size} for as many images, got {len(value)}")
            given[name] = value.expand(batch_size, *value.shape[1:])
        missing = [name for name in self.condition_names(required=True) if name not in given]
        ensure(not missing, f"cond must have {', '.join(missing)}: this network cannot do without")
        if class_labels is not None:
            given["y"] = torch.tensor(self.class_ids(class_labels), device=device)
        return given

    def guidance_at(self, t: torch.Tensor, solver: str, scale: float | None, interval=None) -> dict[str, torch.Tensor]:
        """The conditions that tell a network the CFG scale, at times t, (B,); none for a network that is not told."""
        if self.sampling.guidance_range is None:
            return {}
        scale = self.sampling.guidance_scale if scale is None else scale
        interval = usual_interval(scale, self.sampling.guidance_interval) if interval is None else interval
        return guidance_conditions(scale, interval, t, is_ode=solver != "meanflow")

    @torch.no_grad()
    def __call__(
        self,
        class_labels=None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        solver: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        cond: dict | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Samples one image for each of class_labels; without classes, batch_size images.

        Args:
            class_labels: indices or names, or one of them.
            num_inference_steps: default: meanflow 1, euler 50, heun 25, rk4 12.
            guidance_scale: a network that is told the CFG scale is told this, >= 1. With another network: guidance
                while sampling, two evaluations a step. None: the default, or only what was trained in, if anything.
            guidance_interval: the times in which guidance acts, of a network that is told them; None: the default.
            solver: meanflow, or an ODE solver for the instantaneous velocity: euler, heun, rk4; default: the best one
                for this network.
            latents: the noise, (B, C, *S); default: drawn by the generator, or by one generator for each image.
            cond: further conditions of the network by name, each one value for every image or a single one for all.
            output_type: pil; np, (B, H, W, C) in [0, 1]; pt, (B, C, H, W) in [0, 1]; or latent, as the network makes
                them. Volumes come as the network makes them, (B, C, D, H, W), in numpy unless it is pt or latent.
        Raises:
            ValueError: a class, condition, shape, solver or scale that cannot be; the message says what can.
        """
        solver = solver or self.sampling.solver
        self.check_choice(solver, guidance_scale, guidance_interval)
        num_inference_steps = STEPS[solver] if num_inference_steps is None else num_inference_steps
        if (class_labels is None) == (self.num_classes > 0):
            must = "must" if self.num_classes else "must not"
            raise ValueError(f"class_labels {must} be given: the network has {self.num_classes} classes")
        if class_labels is not None:
            class_labels = [class_labels] if isinstance(class_labels, (int, str)) else class_labels
            batch_size = len(class_labels)
        known = self.conditions(class_labels, cond, batch_size)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator must be one, or {batch_size}, got {len(generator)}")
        shape, device = (batch_size, *self.shape), self._execution_device
        e = randn_tensor(shape, generator, device) if latents is None else latents.to(device)
        ensure(tuple(e.shape) == shape, f"latents must be {shape}, got {tuple(e.shape)}")
        scale = 1.0 if guidance_scale is None or self.sampling.guidance_scale is not None else guidance_scale

        with self.progress_bar(total=num_inference_steps * {"heun": 2, "rk4": 4}.get(solver, 1)) as bar:

            def net(z: torch.Tensor, t: torch.Tensor, h: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
                bar.update()
                return self.net(z.to(self.net.dtype), t, h, **cond)

            def u_fn(z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: dict = known) -> torch.Tensor:
                cond = {**cond, **self.guidance_at(t, solver, guidance_scale, guidance_interval)}
                return average_velocity(net, z, t, r, cond, self.sampling.prediction, self.sampling.t_min)

            guided = u_fn if scale == 1 else cfg(u_fn, known, self.num_classes, scale)
            z = SOLVERS[solver](guided, e.float(), num_inference_steps)
        images = self.to_images(z, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def to_images(self, z: torch.Tensor, output_type: str):
        if output_type != "latent" and self.vae is not None:
            units = self.config.latents
            shift, scale = (torch.tensor(units[a], device=z.device).view(-1, 1, 1) for a in ("shift", "scale"))
            z = self.vae.decode((z / scale + shift).to(self.vae.dtype)).sample
        if z.ndim == 5:
            return z.float().cpu().numpy() if output_type in ("pil", "np") else z.float()
        return self.image_processor.postprocess(z.float(), output_type)

    def save_pretrained(self, save_directory, **options) -> None:
        """As diffusers does, with the code, so that from_pretrained(..., trust_remote_code=True) needs no project."""
        super().save_pretrained(save_directory, **options)
        folder = Path(save_directory)
        name, network = network_file(type(self.net))
        shutil.copyfile(inspect.getfile(cfg), folder / "sampler.py")
        shutil.copyfile(inspect.getfile(noise), folder / "noise.py")
        shutil.copyfile(network, folder / f"net/{name}.py")
        # The copy finds its two companions beside it, instead of in the package.
        code = Path(__file__).read_text().replace("\nfrom meanflow.", "\nfrom .")
        (folder / "pipeline_meanflow.py").write_text(code)
        for path in (folder / "model_index.json", *folder.glob("*/config.json")):
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)  # where it lay on this machine
            if path.parent == folder:
                config["_class_name"] = ["pipeline_meanflow", type(self).__name__]
                config["net"] = [name, type(self.net).__name__]
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def network_file(network: type) -> tuple[str, Path]:
    """The file that a network stands in, and the name that a copy of it gets: modeling_dit, modeling_custom_mine.

    The prefix keeps it apart from modules of diffusers, which has pipelines of names like dit.
    """
    path = Path(inspect.getfile(network))
    if path.stem.startswith("modeling_"):
        return path.stem, path
    is_in_zoo = network.__module__ == f"models.{path.stem}"
    return f"modeling_{'' if is_in_zoo else 'custom_'}{path.stem}", path
