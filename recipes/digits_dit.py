"""MeanFlow DiT-XS/2 on scikit-learn's 1,797 handwritten digits (8 x 8), class-conditional: the job of `make demo`.

    accelerate launch -q recipes/digits_dit.py

Its flow-matching twin is the same with --objective.meanflow-ratio 0 --out runs/digits-flow. Every field is a flag. The
same command resumes from --out.
"""

from pathlib import Path

from meanflow.config import MeanFlowConfig, TrainConfig, run

RECIPE = TrainConfig(
    out=Path("runs/digits"),
    data="digits",
    model="DiT-XS/2",
    objective=MeanFlowConfig(meanflow_ratio=0.5, norm_p=0.5, class_dropout_prob=0.0),
    steps=3200,
    global_batch=64,
    lr=6e-3,
    betas=(0.9, 0.95),
    schedule="cosine",
    warmup_steps=100,
    ema_decay=(0.99,),
)

if __name__ == "__main__":
    run(RECIPE)
