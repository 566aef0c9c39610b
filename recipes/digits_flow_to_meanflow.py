"""From flow matching to MeanFlow: the flow-matching network of the digits becomes a one-step network.

    accelerate launch -q recipes/digits_dit.py --objective.meanflow-ratio 0 --out runs/digits-flow
    accelerate launch -q recipes/digits_flow_to_meanflow.py

A third of the steps that recipes/digits_dit.py takes from scratch. Every field is a flag. The same command resumes
from --out. No paper trains on these digits; ours: docs/weights.md.
"""

from pathlib import Path

from meanflow import MeanFlowConfig, TrainConfig, run

RECIPE = TrainConfig(
    out=Path("runs/digits-flow-to-meanflow"),
    init_from="runs/digits-flow",
    data="digits",
    model="DiT-XS/2",
    objective=MeanFlowConfig(
        meanflow_ratio=0.375,
        # As in recipes/digits_dit.py: one step needs u at t = 1, r = 0.
        time_sampler="v1",
        P_mean=0.2,
        P_std=1.4,
        P_mean_r=-3.0,
        P_std_r=1.4,
        norm_p=0.5,
        class_dropout_prob=0.0,
    ),
    steps=417,
    global_batch=128,
    lr=5e-3,
    betas=(0.9, 0.99),
    schedule="cosine",
    warmup_steps=20,
    ema_decay=(0.95,),
    checkpoint_every=200,
)

if __name__ == "__main__":
    run(RECIPE)
