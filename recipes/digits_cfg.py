"""Improved MeanFlow on scikit-learn's 1,797 handwritten digits: one checkpoint that is sampled at any CFG scale.

    accelerate launch -q recipes/digits_cfg.py
    python tools/sample.py runs/digits-cfg --cfg-scale 1 2 4 6 --out scales.png

Every field is a flag. The same command resumes from --out. No paper trains on these digits; ours: docs/guidance.md.
"""

from pathlib import Path

from meanflow import ImprovedMeanFlowConfig, TrainConfig, run

RECIPE = TrainConfig(
    out=Path("runs/digits-cfg"),
    data="digits",
    model="DiT-XS/2",
    net={"takes_omega": 1},
    objective=ImprovedMeanFlowConfig(
        meanflow_ratio=0.5,
        # As in recipes/digits_dit.py: one step needs u at t = 1, r = 0.
        time_sampler="v1",
        P_mean=0.2,
        P_std=1.4,
        P_mean_r=-3.0,
        P_std_r=1.4,
        norm_p=0.5,
        class_dropout_prob=0.1,
        null_class="flow",
        omega_max=8.0,
        omega_beta=2.0,  # more often near 1, where one set of weights is farthest from a network without guidance
    ),
    steps=2500,
    global_batch=128,
    lr=7e-3,
    betas=(0.9, 0.99),
    schedule="cosine",
    warmup_steps=50,
    ema_decay=(0.95,),
    sample_every=2500,
)

if __name__ == "__main__":
    run(RECIPE)
