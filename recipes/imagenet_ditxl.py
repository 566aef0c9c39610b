"""MeanFlow DiT-XL/2 on ImageNet 256 x 256 latents. Paper (arXiv:2505.13447): FID 3.43 at 1 NFE. Ours: not measured.

    accelerate launch -q recipes/imagenet_ditxl.py --data data/imagenet256 --out runs/ditxl

First tools/cache_latents.py; then --dry-run shows what the run will be, --smoke tries this file in a minute, anywhere.
Every field is a flag. The same command resumes from --out.
"""

from pathlib import Path

from meanflow import MeanFlowConfig, TrainConfig, run

RECIPE = TrainConfig(
    out=Path("runs/ditxl"),
    data="./data/imagenet256",
    resolution=256,
    vae="stabilityai/sd-vae-ft-mse",
    scaling_factor=0.18215,
    # The official code caches mirror images and never reads them, so the paper's numbers are without; --flip mirrors.
    flip=False,
    model="DiT-XL/2",
    objective=MeanFlowConfig(
        meanflow_ratio=0.25,
        P_mean=-0.4,
        P_std=1.0,
        norm_p=1.0,
        norm_eps=0.01,
        omega=0.2,
        kappa=0.92,
        t_end=0.75,
        class_dropout_prob=0.1,
        null_class="flow",
    ),
    epochs=240.0,
    global_batch=256,
    lr=1e-4,
    betas=(0.9, 0.95),
    ema_decay=(0.9999,),
    mixed_precision="bf16",
    compile=True,
    workers=4,
    log_every=100,
    sample_every=5000,
    checkpoint_every=10000,
)

if __name__ == "__main__":
    run(RECIPE)
