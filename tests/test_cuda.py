"""What only a GPU shows: `pytest --cuda`. The golden numbers run there, too."""

import pytest
import torch
from conftest import ZOO, batch_of

from meanflow.config import MeanFlowConfig
from meanflow.objectives.draws import make_draws, order_slots
from meanflow.objectives.meanflow import MeanFlow

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("name", ZOO)
def test_loss_and_gradients_are_those_of_the_cpu(name):
    """Guided, so that every kind of row is there; without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    config = MeanFlowConfig(meanflow_ratio=0.5, kappa=0.5)
    net = ZOO[name]().eval()
    draws = make_draws(config, net.z_shape, 0, order_slots(config, range(8), 8))
    x, y = torch.randn(8, *net.z_shape), torch.randint(5, (8,))
    found = []
    for device in ("cpu", "cuda"):
        objective = MeanFlow(net.to(device), config)
        objective.zero_grad()
        loss = objective(batch_of(x.to(device), y.to(device), draws.to(device))).loss
        loss.backward()
        gradients = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        found.append((loss.item(), torch.cat(gradients).cpu()))
    (loss, gradient), (loss_gpu, gradient_gpu) = found
    assert loss_gpu == pytest.approx(loss, rel=1e-4)
    assert (gradient_gpu - gradient).norm() < 1e-3 * gradient.norm()


def test_dropout_drops_the_same_in_u_and_in_du_dt():
    """PyTorch's fused kernel has a branch of its own in the derivative."""
    from torch.nn.functional import dropout

    from meanflow.objectives.jvp import jvp

    x = torch.ones(10_000, device="cuda")
    u, du = jvp(lambda x: dropout(x, 0.25), (x,), (3 * x,))
    torch.testing.assert_close(du, 3 * u)
    assert 0.7 < (u != 0).float().mean() < 0.8
