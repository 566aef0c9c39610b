"""Pixel MeanFlow on ImageNet 256 x 256, without a VAE. Paper (arXiv:2601.22158): FID 3.12 at 1 NFE for pMF-B/16.
Ours: not measured.

    accelerate launch -q recipes/imagenet_pixel_b16.py --data /imagenet/train --out runs/pixel-b16
    python tools/sample.py runs/pixel-b16 --classes 207 --cfg-scale 8.5 --cfg-interval 0.1 0.7

It has the paper's prediction of the clean image, its times, batch and length. It lacks the paper's perceptual losses,
its optimiser Muon (here Adam) and its network, which is like iMF-B/2: so it is no reproduction.

--dry-run shows what the run will be, --smoke tries this file in a minute, anywhere. Every field is a flag. The same
command resumes from --out.
"""

from pathlib import Path

from meanflow import ImprovedMeanFlowConfig, TrainConfig, run

RECIPE = TrainConfig(
    out=Path("runs/pixel-b16"),
    data="./data/imagenet",
    resolution=256,
    flip=True,
    model="DiT-B/16",
    net={"takes_omega": 1},
    objective=ImprovedMeanFlowConfig(
        meanflow_ratio=0.5,
        P_mean=0.8,
        P_std=0.8,
        norm_p=1.0,
        norm_eps=0.01,
        prediction="x",
        t_min=0.05,
        omega_max=8.0,
        omega_beta=1.0,
        class_dropout_prob=0.1,
        null_class="flow",
        guidance_scale=8.5,
        guidance_interval=(0.1, 0.7),
    ),
    epochs=320.0,
    global_batch=1024,
    lr=1e-4,
    betas=(0.9, 0.95),
    ema_decay=(0.9999,),
    mixed_precision="bf16",
    compile=True,
    workers=8,
    log_every=100,
    sample_every=5000,
    checkpoint_every=10000,
)

if __name__ == "__main__":
    run(RECIPE)
