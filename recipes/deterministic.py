"""A sanity check: memorise a few fixed (noise, image) pairs. With r != t samples, one step must give the images back.

    accelerate launch -q recipes/deterministic.py                              # 4 pairs, a quarter r != t
    accelerate launch -q recipes/deterministic.py --objective.meanflow-ratio 0 # flow matching
    accelerate launch -q recipes/deterministic.py --objective.norm-p 0         # without the adaptive weight
    accelerate launch -q recipes/deterministic.py --subset 4 10                # 4 classes x 10 images

Expected: raw_loss in log.jsonl below 1e-4 per pixel (an image has 64), and samples/ shows the digits 0 to 3.
"""

from pathlib import Path

from meanflow import MeanFlowConfig, TrainConfig, run

RECIPE = TrainConfig(
    out=Path("runs/deterministic"),
    data="digits",
    subset=(4, 1),
    fixed_noise=True,
    model="DiT-XS/4",
    objective=MeanFlowConfig(meanflow_ratio=0.25, class_dropout_prob=0.0),
    steps=1000,
    global_batch=64,
    lr=2e-3,
    schedule="cosine",
    ema_decay=(0.99,),
)

if __name__ == "__main__":
    run(RECIPE)
