"""MeanFlow U-Net on CIFAR-10 with its ten classes and guidance trained in: no paper's recipe, and not measured in full.

docs/training.md has what guidance does to a small network on digits.

    accelerate launch -q recipes/cifar10_unet_cond.py --out runs/cifar10_cond

--data also takes a copy on disk: parquet, arrow, or a folder of images by class. --dry-run shows what the run will be,
--smoke tries this file in a minute, anywhere. Every field is a flag. The same command resumes from --out.
"""

from pathlib import Path

from meanflow import MeanFlowConfig, TrainConfig, run

RECIPE = TrainConfig(
    out=Path("runs/cifar10_cond"),
    data="uoft-cs/cifar10",
    resolution=32,
    crop=False,
    flip=True,
    augment=0.12,
    model="UNet-cifar",
    net={"model_channels": 128, "channel_mult": (2, 2, 2), "num_blocks": 4, "dropout": 0.2, "augment_dim": 6},
    objective=MeanFlowConfig(
        meanflow_ratio=0.75,
        time_sampler="v1",
        P_mean=-0.6,
        P_std=1.6,
        P_mean_r=-4.0,
        P_std_r=1.6,
        norm_p=0.75,
        norm_eps=1e-3,
        omega=1.0,
        kappa=0.5,
        class_dropout_prob=0.1,
        null_class="flow",
    ),
    epochs=16000.0,
    global_batch=1024,
    lr=6e-4,
    betas=(0.9, 0.999),
    warmup_steps=9766,  # 200 epochs
    ema_decay=(0.9999, 0.99995, 0.9996),
    tf32=True,
    compile=True,
    workers=4,
    log_every=100,
    sample_every=5000,
    checkpoint_every=10000,
)

if __name__ == "__main__":
    run(RECIPE)
