"""The table of what one-step sampling costs."""

from .options import Sample
from .ways import build, interleaved


def sampling(options: Sample) -> list[dict]:
    """A row a batch and way: seconds, images/s and the ratio to the bare forward."""
    import torch

    from meanflow.data.vae import load_vae
    from meanflow.objectives.base import Sampling
    from meanflow.publishing.pipeline import MeanFlowPipeline

    net, vae = build(options).eval(), load_vae(options.vae).to(options.device) if options.vae else None
    if options.dtype == "bf16":
        for part in (net, vae):
            if part is not None:
                torch.nn.Module.to(part, torch.bfloat16)
    pipe = MeanFlowPipeline(net, vae, Sampling()._asdict(), {}, {"shift": 0.0, "scale": 0.18215})
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for batch in options.batch:
        e, classes = torch.randn(batch, *pipe.shape).to(options.device), net.config.num_classes
        y = [k % classes for k in range(batch)] if classes else None
        t, labels = torch.ones(batch).to(options.device), torch.tensor(y).to(options.device) if classes else None
        ways = {
            "the bare forward": lambda e=e, t=t, labels=labels: net(e.to(net.dtype), t, t, labels),
            "one step": lambda e=e, y=y: pipe(y, len(e), latents=e, output_type="latent"),
        }
        if vae:
            ways["one step, decoded"] = lambda e=e, y=y: pipe(y, len(e), latents=e, output_type="pt")
        with torch.no_grad():
            seconds = interleaved(ways, options)
        for name, value in seconds.items():
            ratio = value / seconds["the bare forward"]
            rows.append({"batch": batch, "way": name, "seconds": value, "ratio": ratio, "images": batch / value})
    return rows


def print_sample(rows: list[dict]) -> None:
    print("| batch | | images/s | x the bare forward's time |\n|---:|:---|---:|---:|")
    for row in rows:
        print(f"| {row['batch']} | {row['way']} | {row['images']:.3g} | {row['ratio']:.3f} |")
