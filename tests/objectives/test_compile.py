"""The compiled step: one graph, compiled once, with the numbers of the eager one."""

import copy
import socket
from dataclasses import replace

import pytest
import torch
from conftest import GUIDED, GUIDED_ZOO, TOLD, ZOO, batch_of, guided, small_dit
from torch._dynamo import config as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from meanflow.config import ImprovedMeanFlowConfig, MeanFlowConfig
from meanflow.objectives import OBJECTIVES
from meanflow.objectives.base import Batch
from meanflow.objectives.draws import order_slots
from meanflow.objectives.jvp import jvp
from meanflow.objectives.meanflow import MeanFlow
from meanflow.training.compile import compile_objective

pytestmark = pytest.mark.apart
B = 8


@pytest.fixture(autouse=True)
def forget():
    """Each test compiles for itself; what is compiled a second time is an error."""
    torch._dynamo.reset()
    counters.clear()
    with dynamo.patch(error_on_recompile=True):
        yield


def batch_at(config: MeanFlowConfig, net, step: int, size: int = B) -> Batch:
    slots = order_slots(config, range(step * size, (step + 1) * size), size)
    draws = OBJECTIVES[type(config)].make_draws(config, net.z_shape, 0, slots)
    more = {"augment_labels": torch.randn(size, 6)} if net.config.get("augment_dim") else {}
    return batch_of(torch.randn(size, *net.z_shape), torch.randint(5, (size,)), draws, **more)


def one_step(objective: MeanFlow, batch: Batch, seed: int) -> dict[str, torch.Tensor]:
    """Loss, metrics and gradients of a step whose dropout begins at this seed."""
    torch.manual_seed(seed)
    objective.zero_grad()
    out = objective(batch, seed)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), **out.metrics, **gradients}


def assert_same_steps(objective: MeanFlow, steps: int = 10, size: int = B, bf16: bool = False, **compiler) -> None:
    """Steps of the compiled objective are those of the eager one, each begun from equal weights, in one graph."""
    compiled = copy.deepcopy(objective)
    compile_objective(compiled, **compiler)
    for step in range(steps):
        batch = batch_at(objective.config, objective.net, step, size)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            expected, actual = (one_step(o, batch, step) for o in (objective, compiled))
        assert expected.keys() == actual.keys() and expected["du_dt"] > 0
        gradient, error = (
            torch.cat(
                [(actual[name] * minus - expected[name]).flatten().float() for name in expected if "net." in name]
            )
            for minus in (0, 1)
        )
        assert error.norm() <= 1e-5 * gradient.norm()
        for name in ("loss", "du_dt", "raw_loss"):
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=0)
        with torch.no_grad():
            for ours, theirs in zip(objective.parameters(), compiled.parameters()):
                if ours.grad is not None:
                    ours -= 0.01 * ours.grad
                theirs.copy_(ours)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDED_ZOO)
def test_every_network_compiles_to_the_same_numbers(name):
    """Guided, in training, so with the mask of dropout; in one graph that is compiled once.

    A tangent that is dropped where torch.compile cannot see it would show in du_dt.
    """
    assert_same_steps(guided(name), backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name, bf16", [("DiT", True), ("UNet-cifar", False), ("iMF", False)])
def test_checkpointed_blocks_compile_to_the_same_numbers(name, bf16):
    objective = guided(name) if name in TOLD else MeanFlow(ZOO[name](), MeanFlowConfig())
    objective.net.enable_gradient_checkpointing()
    assert_same_steps(objective, steps=3, bf16=bf16, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DiT", "UNet-cifar", "iMF"])
def test_inductor_gives_the_same_numbers(name):
    """Dropout by PyTorch's own generator, so that its masks are the eager ones.

    Without the options that compile_objective gives for regions, the conditioning's gradient is wrong by percents.
    """
    plain = name == "UNet-cifar"
    objective = MeanFlow(ZOO[name](), MeanFlowConfig(meanflow_ratio=0.75)) if plain else guided(name)
    assert_same_steps(objective, fallback_random=True)


def compare_on_one_of_two(rank: int, port: int) -> None:
    """Of two processes: steps of every network, compiled and eager, inside DDP."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name in GUIDED_ZOO:
        torch._dynamo.reset()
        eager, compiled = guided(name), guided(name)
        compile_objective(compiled, backend="aot_eager")
        wrapped = [DistributedDataParallel(o, gradient_as_bucket_view=True) for o in (eager, compiled)]
        for step in range(10):
            torch.manual_seed(2 * step + rank)
            batch = batch_at(eager.config, eager.net, 2 * step + rank)
            (loss, gradient), (found, found_gradient) = (synchronised_step(o, batch, step) for o in wrapped)
            assert abs(found - loss) <= 1e-5 * loss, name
            assert (found_gradient - gradient).norm() <= 1e-5 * gradient.norm(), name
            with torch.no_grad():
                for ours, theirs in zip(eager.parameters(), compiled.parameters()):
                    ours -= 0.01 * ours.grad
                    theirs.copy_(ours)
    torch.distributed.destroy_process_group()


def synchronised_step(objective, batch: Batch, step: int) -> tuple[float, torch.Tensor]:
    torch.manual_seed(step)
    objective.zero_grad(set_to_none=False)
    loss = objective(batch, step).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in objective.parameters()]).clone()


@pytest.mark.slow
def test_every_network_compiles_to_the_same_numbers_on_two_processes():
    """Gradients are those that DDP has averaged."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(compare_on_one_of_two, (port,), nprocs=2)


@pytest.mark.slow
def test_blocks_are_traced_once():
    """However many there are, there is one graph for each way in which blocks are called."""
    regions = []

    def look(graph: torch.fx.GraphModule, inputs) -> torch.fx.GraphModule:
        calls = [node for node in graph.graph.nodes if node.target is torch.ops.higher_order.invoke_subgraph]
        regions.append((len(calls), len({node.args[0].target for node in calls})))
        return graph

    objective = MeanFlow(small_dit(depth=5), GUIDED)
    compile_objective(objective, backend=look)
    objective(batch_at(GUIDED, objective.net, 0))
    assert regions == [(3 * 5, 3)]  # flow matching, guidance, and r != t rows with their tangents


@pytest.mark.slow
@pytest.mark.parametrize("config", [GUIDED, ImprovedMeanFlowConfig()], ids=["MeanFlow", "improved"])
def test_guided_steps_are_never_compiled_again(config):
    """Guidance acts on another number of rows at each of these 200 steps."""
    net = small_dit(depth=1, takes_omega=config is not GUIDED)
    objective = OBJECTIVES[type(config)](net, config)
    compile_objective(objective, backend="eager")
    acting = set()
    for step in range(200):
        batch = batch_at(config, objective.net, step, 32)
        acting.add(int(batch.draws.guided.acts.sum()))
        objective(batch, step)
    assert len(acting) > 5


def test_guidance_that_begins_at_a_step_is_compiled_once_more():
    config, graphs = replace(GUIDED, guidance_from_step=3), []
    objective = MeanFlow(small_dit(depth=1), config)
    compile_objective(objective, backend=lambda graph, inputs: graphs.append(step) or graph)
    with dynamo.patch(error_on_recompile=False):
        for step in range(8):
            objective(batch_at(config, objective.net, step, 32), step)
    assert graphs == [0, 3]


@pytest.mark.parametrize("view", [lambda x: x[:2], lambda x: x.t(), lambda x: x[:, ::2]], ids=["rows", "t", "strided"])
@pytest.mark.parametrize("inside", [True, False])
def test_views_as_dual_inputs_compile(view, inside):
    """Some releases of torch refuse them: made inside the graph, and given to it."""
    x, d = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)

    def derivative(x, d):
        return jvp(torch.sin, (view(x),), (view(d),)) if inside else jvp(torch.sin, (x,), (d,))

    given = (x, d) if inside else (view(x), view(d))
    u, du = torch.compile(derivative, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(du, view(x).cos() * view(d))
    u.sum().backward()
    torch.testing.assert_close(view(x.grad), view(x.detach()).cos())


class Branches(MeanFlow):
    def weighted_loss(self, squared_error):
        loss = super().weighted_loss(squared_error)
        return loss if loss > 0 else -loss


def test_a_branch_on_a_tensor_does_not_compile():
    objective = Branches(small_dit(), MeanFlowConfig(meanflow_ratio=0.0))
    compile_objective(objective, backend="eager")
    with pytest.raises(TorchDynamoException):
        objective(batch_at(objective.config, objective.net, 0))


class Scheduled(MeanFlow):
    def forward(self, batch, step):
        out = super().forward(batch, step)
        return out._replace(loss=out.loss * (1 + step))


def test_a_step_that_is_read_is_compiled_at_each_value_and_then_refused():
    """As the documentation of --compile says: 8 graphs are allowed."""
    objective = Scheduled(small_dit(depth=1), MeanFlowConfig(meanflow_ratio=0.0))
    compile_objective(objective, backend="eager")
    with dynamo.patch(error_on_recompile=False):
        for step in range(8):
            objective(batch_at(objective.config, objective.net, 0), step)
        with pytest.raises(FailOnRecompileLimitHit):
            objective(batch_at(objective.config, objective.net, 0), 8)


def test_a_block_that_is_called_by_keyword_is_refused_in_a_region():
    """Else what is given by keyword would be left out."""
    net = small_dit()
    forward = type(net.blocks[0]).forward

    class ByKeyword(type(net.blocks[0])):
        def __call__(self, x, c):
            return forward(self, x, c=c)

    net.blocks[0].__class__ = ByKeyword
    objective = MeanFlow(net, MeanFlowConfig(meanflow_ratio=1.0))
    compile_objective(objective, backend="eager")
    with pytest.raises(TorchDynamoException, match="only tensors, by position"):
        objective(batch_at(objective.config, net, 0))


class Squared(torch.nn.Module):
    """The derivative of x^3 / 3 by a transform, inside which only PyTorch can read tangents."""

    def forward(self, x):
        return torch.func.grad(lambda x: (x**3 / 3).sum())(x)


def test_a_transform_is_refused_in_a_region():
    """Else its tangent would be 0 without an error."""
    net = small_dit()
    net.blocks[0].mlp.act = Squared()
    objective = MeanFlow(net, MeanFlowConfig(meanflow_ratio=1.0))
    compile_objective(objective, backend="eager")
    with pytest.raises(TorchDynamoException):
        objective(batch_at(objective.config, net, 0))


def test_an_operation_without_a_rule_is_refused_in_a_region():
    """Not computed without its tangent: outside of regions PyTorch's forward mode takes it."""
    net = small_dit()
    net.blocks[0].mlp.act = torch.nn.Mish()
    objective = MeanFlow(net, MeanFlowConfig(meanflow_ratio=1.0))
    compile_objective(objective, backend="eager")
    with pytest.raises(TorchDynamoException, match="mish has no rule"):
        objective(batch_at(objective.config, net, 0))
