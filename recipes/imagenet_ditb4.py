"""MeanFlow DiT-B/4 on ImageNet 256 x 256 latents. Ours: not measured. Paper (arXiv:2505.13447), 80 epochs: FID at 1 NFE
15.53 with --objective.omega 3 --objective.kappa 0, and 61.06 with --objective.omega 1 --objective.kappa 0. The official
code's README reports 11.4 for this recipe's guidance after --epochs 240.

    accelerate launch -q recipes/imagenet_ditb4.py --data data/imagenet256 --out runs/ditb4

First tools/cache_latents.py; then --dry-run shows what the run will be, --smoke tries this file in a minute, anywhere.
Every field is a flag. The same command resumes from --out.
"""

from pathlib import Path

from meanflow import MeanFlowConfig, TrainConfig, run

RECIPE = TrainConfig(
    out=Path("runs/ditb4"),
    data="./data/imagenet256",
    resolution=256,
    vae="stabilityai/sd-vae-ft-mse",
    scaling_factor=0.18215,
    # The official code caches mirror images and never reads them, so the paper's numbers are without; --flip mirrors.
    flip=False,
    model="DiT-B/4",
    objective=MeanFlowConfig(
        meanflow_ratio=0.25,
        P_mean=-0.4,
        P_std=1.0,
        norm_p=1.0,
        norm_eps=0.01,
        omega=1.0,
        kappa=0.5,
        class_dropout_prob=0.1,
        null_class="flow",
    ),
    epochs=80.0,
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
