"""MeanFlow on points of a plane: a ring of eight Gaussians, or a checkerboard, with an MLP, in a minute on 2 CPU cores.

    python recipes/toy2d.py                                  # the ring
    python recipes/toy2d.py --data checkerboard --out runs/checkerboard
    python tools/toy2d_report.py runs/toy2d                  # compares u with the true average velocity, and draws it

Every field is a flag. The same command resumes from --out. No paper has these figures; ours: docs/evaluation.md.
"""

import sys
from pathlib import Path

from meanflow import MeanFlowConfig, TrainConfig, run

RECIPE = TrainConfig(
    out=Path("runs/toy2d"),
    data="ring",
    class_conditional=False,
    model="MLP",
    net={"hidden_size": 128, "depth": 6, "num_frequencies": 2},
    objective=MeanFlowConfig(
        meanflow_ratio=0.5,
        time_sampler="v1",
        P_mean=0.4,
        P_std=1.6,
        P_mean_r=-4.0,
        P_std_r=1.6,
        norm_p=0.0,  # of two numbers, the weight would take the mode of the velocity for its mean
        class_dropout_prob=0.0,
    ),
    steps=2800,
    global_batch=512,
    lr=2e-3,
    betas=(0.9, 0.99),
    schedule="cosine",
    warmup_steps=100,
    max_grad_norm=1.0,
    ema_decay=(0.998,),
    workers=1,
    log_every=100,
    checkpoint_every=1400,
    sample_every=1400,
)


def data(recipe: TrainConfig):
    """The points that recipe.data names."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from recipes.experiments.plane import Plane

    return Plane(recipe)


if __name__ == "__main__":
    run(RECIPE, data=data)
