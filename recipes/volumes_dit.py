r"""MeanFlow DiT on volumes, such as the latents of scans: it predicts the clean volume (arXiv:2601.22158); no classes.

    accelerate launch -q recipes/volumes_dit.py --data /volumes --out runs/volumes
    accelerate launch -q recipes/volumes_dit.py --data shapes --model DiT-XS/4 --net hidden_size 128 --steps 700 \
        --global-batch 64 --accumulation-steps 1 --lr 2e-3 --schedule cosine --ema-decay 0.99 --warmup-steps 50 \
        --checkpoint-every 350 --out runs/shapes

--data is a folder of .npy files or of .safetensors files with the key volume, each (C, D, H, W) with sides that are
multiples of 4; these settings are for 4 x 48 x 48 x 48. shapes are 512 synthetic volumes of 4 x 16 x 16 x 16, on which
the second command takes minutes on 2 CPU cores. Every field is a flag. The same command resumes from --out.
No paper trains on these; ours: docs/training.md.
"""

from pathlib import Path

from meanflow import MeanFlowConfig, TrainConfig, run

RECIPE = TrainConfig(
    out=Path("runs/volumes"),
    data="./data/volumes",
    model="DiT-S/4",
    objective=MeanFlowConfig(
        meanflow_ratio=0.25,
        # One step needs u at t = 1.
        P_mean=0.6,
        P_std=1.0,
        prediction="x",
        norm_p=0.5,
        norm_eps=1.0,
        # So that a channel of large numbers does not take the whole loss.
        channel_weights="inverse-variance",
        class_dropout_prob=0.0,
    ),
    steps=100_000,
    global_batch=128,  # 32 of them with r != t; fewer make a noisy gradient
    accumulation_steps=8,
    lr=1e-4,
    betas=(0.9, 0.95),
    warmup_steps=100,
    ema_decay=(0.999,),
    log_every=50,
    sample_every=1000,
    checkpoint_every=1000,
)

if __name__ == "__main__":
    run(RECIPE)
