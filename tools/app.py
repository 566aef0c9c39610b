"""A page to play with a checkpoint: classes, seeds, CFG scales, one step beside fifty, a walk between two noises.

    python tools/app.py runs/digits                      # then open http://127.0.0.1:7860
    python tools/app.py user/ditxl --host 0.0.0.0        # for others, too

It needs pip install -e '.[app]', and no network. The same file is a Space of the Hub, which needs only diffusers,
timm, gradio and tyro: tools/push_to_hub.py --space writes it.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

SPACE = Path(__file__).with_name("space.json")  # beside a Space's app.py, with the id of its model
SIDE = 96  # pixels that a sample has at least on the page
FONTS = ["system-ui", "sans-serif"]  # of this machine: the default theme would fetch its own
EVERY = "each class in turn"


@dataclass(frozen=True)
class Options:
    checkpoint: tyro.conf.Positional[str]
    """a run (its newest checkpoint), a checkpoint, a folder of tools/export.py, or a Hub id"""
    host: str = "127.0.0.1"
    """the address to listen at; default: only this machine can open the page; 0.0.0.0: others, too"""
    port: int = 7860
    """the page is http://HOST:PORT"""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; default: the best there is"""
    trust_remote_code: bool = False
    """run the file of a network that is not in the zoo, which lies beside its weights; read it first"""


def grid(images, columns: int):
    """One picture of many, (B, C, H, W) in [0, 1], as (H, W, 3) uint8; small ones are enlarged."""
    from torchvision.utils import make_grid

    factor = max(1, -(-SIDE // min(images.shape[2:])))
    images = images.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
    picture = make_grid(images.float().cpu(), nrow=columns, padding=4, pad_value=1.0)
    return (picture * 255).round().byte().permute(1, 2, 0).numpy()


class Page:
    """What the page shows of one pipeline, and what its buttons do."""

    def __init__(self, pipe):
        self.pipe, how = pipe, pipe.sampling
        self.is_flow = how.solver != "meanflow"
        self.is_told = how.guidance_range is not None  # the CFG scale costs nothing
        may_guide = how.null_class == "any" or (how.null_class is not None and self.is_flow)
        self.has_scale = self.is_told or (pipe.num_classes > 0 and how.guidance_scale is None and may_guide)
        names = [pipe.id2label.get(index, str(index)) for index in range(pipe.num_classes)]
        # Some lists of ImageNet's classes have two of the name crane.
        self.names = [f"{name}, {k}" if names.count(name) > 1 else name for k, name in enumerate(names)]

    def draw(self, e, y: list[int] | None, steps: int, solver: str, scale=None, interval=None):
        """The samples of noise e, (B, C, H, W) in [0, 1], and the seconds that they took."""
        begin = time.perf_counter()
        how = {"num_inference_steps": steps, "solver": solver, "latents": e, "output_type": "pt"}
        how |= {"guidance_scale": scale if self.has_scale else None}
        how |= {"guidance_interval": interval if self.is_told else None}
        return self.pipe(y, len(e), **how).images, time.perf_counter() - begin

    def classes(self, name: str | None, count: int) -> list[int] | None:
        if not self.names:
            return None
        return [number % len(self.names) if name == EVERY else self.names.index(name) for number in range(count)]

    def samples(self, name, count, seed, steps, scale, start, end):
        e = self.pipe.noise(int(seed or 0), range(int(count)))
        usual = tuple(self.pipe.sampling.guidance_interval or ())
        interval = None if (start, end) == usual else (float(start), float(end))  # None: what suits the scale
        how = int(steps), self.pipe.sampling.solver, float(scale), interval
        images, seconds = self.draw(e, self.classes(name, len(e)), *how)
        columns = len(self.names) if name == EVERY and len(self.names) <= 16 else 8
        return grid(images, min(len(images), columns)), said(len(images), int(steps), seconds)

    def compare(self, name, seed):
        """The same noise in one step and in fifty."""
        e, found = self.pipe.noise(int(seed or 0), range(8)), []
        for steps, solver in ((1, self.pipe.sampling.solver), (50, "euler")):
            images, seconds = self.draw(e, self.classes(name, len(e)), steps, solver)
            found += [grid(images, 4), said(len(images), steps, seconds)]
        return found

    def walk(self, name, first, last, count):
        """Samples of noises on the arc between two."""
        if not hasattr(self.pipe, "walk"):
            raise ValueError("this model was exported by an earlier version: export it again")
        e = self.pipe.walk(int(first or 0), int(last or 0), int(count))
        y = None if not self.names else self.classes(self.names[0] if name == EVERY else name, len(e))
        steps = 50 if self.is_flow else 1
        images, seconds = self.draw(e, y, steps, self.pipe.sampling.solver)
        return grid(images, min(len(images), 8)), said(len(images), steps, seconds)

    def build(self, title: str):
        """The Gradio page."""
        import gradio as gr

        def guarded(action):
            def act(*values):
                try:
                    return action(*values)
                except (ValueError, TypeError) as error:
                    raise gr.Error(str(error)) from None

            return act

        how = self.pipe.sampling
        least, most = how.guidance_range or (1.0, 8.0)
        start, end = how.guidance_interval or (0.0, 1.0)
        parameters = f"{self.pipe.net.num_parameters():,} parameters"
        plain = {"format": "png", "interactive": False, "show_label": False, "buttons": ["download", "fullscreen"]}
        with gr.Blocks(title=title, analytics_enabled=False) as page:
            gr.Markdown(f"# {title}\n{parameters}. Guidance: {how.guidance}.")
            choices = [*self.names, *[EVERY] * (len(self.names) > 1)]
            name = gr.Dropdown(choices, value=choices[0] if choices else None, label="Class", visible=bool(choices))
            with gr.Tab("Samples"):
                with gr.Row():
                    count = gr.Slider(1, 32, value=8, step=1, label="Images")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                    steps = gr.Slider(1, 50, value=how.num_inference_steps, step=1, label="Steps")
                with gr.Row(visible=self.has_scale):
                    usual = how.guidance_scale if self.is_told else 1.0
                    price = "free" if self.is_told else "two evaluations a step"
                    scale = gr.Slider(least, most, value=usual, step=0.1, label=f"CFG scale ({price})")
                    from_t = gr.Slider(0, 1, value=start, step=0.01, label="Guidance from t", visible=self.is_told)
                    to_t = gr.Slider(0, 1, value=end, step=0.01, label="Guidance to t", visible=self.is_told)
                button = gr.Button("Sample", variant="primary")
                picture = gr.Image(elem_id="samples", **plain)
                took = gr.Markdown(elem_id="took")
                inputs = [name, count, seed, steps, scale, from_t, to_t]
                button.click(guarded(self.samples), inputs, [picture, took], api_name="samples")
            with gr.Tab("One step beside fifty"):
                other_seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                compare = gr.Button("Compare", variant="primary")
                with gr.Row():
                    shown = []
                    for label in ("1 step", "50 steps of Euler's method"):
                        with gr.Column():
                            gr.Markdown(label)
                            shown += [gr.Image(**plain), gr.Markdown()]
                compare.click(guarded(self.compare), [name, other_seed], shown, api_name="compare")
            with gr.Tab("A walk between two noises"):
                with gr.Row():
                    first = gr.Number(0, precision=0, minimum=0, label="From seed")
                    last = gr.Number(1, precision=0, minimum=0, label="To seed")
                    frames = gr.Slider(2, 32, value=8, step=1, label="Images")
                walk = gr.Button("Walk", variant="primary")
                strip = gr.Image(**plain)
                strip_took = gr.Markdown()
                walk.click(guarded(self.walk), [name, first, last, frames], [strip, strip_took], api_name="walk")
        return page


def said(count: int, steps: int, seconds: float) -> str:
    each = f", {1000 * seconds / count:.3g} ms each" if count > 1 else ""
    return f"{count} image{'s' * (count > 1)}, {steps} step{'s' * (steps > 1)}: {seconds:.3f} s{each}"


def show(pipe, title: str, host: str | None, port: int | None) -> None:
    """Serves the page until it is interrupted."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    pipe.set_progress_bar_config(disable=True)
    theme = gr.themes.Default(font=FONTS, font_mono=["monospace"])
    page = Page(pipe).build(title)
    page.queue(default_concurrency_limit=1)
    how = {"share": False, "theme": theme, "footer_links": [], "quiet": True, "prevent_thread_lock": True}
    try:
        _, address, _ = page.launch(server_name=host, server_port=port, **how)
    except OSError as error:
        raise ValueError(f"host {host}, port {port} cannot be listened at: choose another --port") from error
    print(f"{title}: {address} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def main(options: Options) -> None:
    from importlib.util import find_spec

    from meanflow.config import check
    from meanflow.files import ensure

    check(0 < options.port < 2**16, "port", options.port, "in [1, 65535]")
    ensure(find_spec("gradio") is not None, "gradio is not installed: pip install -e '.[app]'")
    from meanflow.publishing.checkpoints import load_pipeline
    from samples.device import find_device

    device = find_device(options.device)
    pipe = load_pipeline(options.checkpoint, trust_remote_code=options.trust_remote_code)
    is_picture = len(pipe.shape) == 3 and (pipe.vae is not None or pipe.shape[0] in (1, 3))
    ensure(is_picture, f"{options.checkpoint} makes no pictures, but samples of {'x'.join(map(str, pipe.shape))}")
    needed = pipe.condition_names(required=True)
    ensure(not needed, f"{options.checkpoint} needs {', '.join(needed)}, which the page cannot give")
    pipe.to(device)
    name = Path(options.checkpoint).name
    show(pipe, name, options.host, options.port)


def main_of_space() -> None:
    """In a Space: the model that space.json names, from the Hub, with the code that is saved beside it."""
    import torch
    from diffusers import DiffusionPipeline

    model, revision = json.loads(SPACE.read_text()).values()
    pipe = DiffusionPipeline.from_pretrained(model, revision=revision, trust_remote_code=True)
    show(pipe.to("cuda" if torch.cuda.is_available() else "cpu"), model, None, None)


if __name__ == "__main__":
    if SPACE.exists():
        main_of_space()
    else:
        from meanflow.program import read_flags, refusals

        with refusals():
            main(read_flags(Options))
