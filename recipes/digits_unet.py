"""MeanFlow U-Net (diffusers' blocks) on scikit-learn's 1,797 handwritten digits (8 x 8), class-conditional.

    accelerate launch -q recipes/digits_unet.py
    python tools/digits_report.py runs/digits_unet

Every field is a flag. The same command resumes from --out. No paper trains on these digits; ours: docs/training.md, 3
minutes on 2 CPU cores.
"""

from pathlib import Path

from meanflow import MeanFlowConfig, TrainConfig, run

RECIPE = TrainConfig(
    out=Path("runs/digits_unet"),
    data="digits",
    model="UNet-digits",
    objective=MeanFlowConfig(
        meanflow_ratio=0.5,
        # One step needs u at t = 1, r = 0, where the paper's times for ImageNet hardly ever fall.
        time_sampler="v1",
        P_mean=0.2,
        P_std=1.4,
        P_mean_r=-3.0,
        P_std_r=1.4,
        norm_p=0.5,
        class_dropout_prob=0.0,
    ),
    steps=600,
    global_batch=128,
    lr=3e-3,
    betas=(0.9, 0.99),
    schedule="cosine",
    warmup_steps=50,
    ema_decay=(0.95,),
    checkpoint_every=200,
)

if __name__ == "__main__":
    run(RECIPE)
