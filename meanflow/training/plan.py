"""What a big run will cost on GPUs that are not here: --dry-run --plan h100 64."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from meanflow.data.loader import SlotBatches, SlotData
from meanflow.training.preflight import Plan, checkpoint_bytes, gib, memory

# Multiplications and additions per second, dense, by NVIDIA's data sheets: in bfloat16, TF32 and float32.
PEAK_FLOPS = {"a100": (312e12, 156e12, 19.5e12), "h100": (989e12, 494e12, 67e12), "h200": (989e12, 494e12, 67e12)}
MFU = 0.4  # the share of it that is assumed: well-made training reaches it, and small networks do not
DISK = 1e9  # bytes per second that are assumed


def count(plan: Plan) -> tuple[int, int, list[bool]]:
    """FLOPs of a micro-batch's step, bytes kept for its backward, and whether each forward has a backward; counted."""
    recipe, saved, forwards = plan.recipe, {}, []
    last = range(plan.total - 1, plan.total)  # guidance may begin later than the run
    slots = next(iter(SlotBatches(recipe, plan.objective, len(plan.data), last, 0, plan.num_processes)))
    batch = SlotData(recipe, plan.objective, plan.data).__getitems__(slots)

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    precision = torch.autocast("cpu", torch.bfloat16, enabled=recipe.mixed_precision == "bf16")
    without_computing = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with without_computing:
        net = type(plan.net).from_config(plan.net.config)
        # An objective may call a network with two heads in parts, of which the patches' embedder is the first.
        first = net.x_embedder if hasattr(net, "trunk") else net
        first.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
        if recipe.activation_checkpointing:
            net.enable_gradient_checkpointing()
        objective = plan.objective(net, recipe.objective).train()
    objective.prepare(plan.data)  # it looks at values
    with without_computing, FlopCounterMode(display=False) as counter:
        with precision, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = objective(batch._replace(x=torch.zeros(len(slots), *plan.data.shape)), 0).loss
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        size = sum(storage.nbytes() for key, storage in saved.items() if key not in weights)
        loss.backward()
    return counter.get_total_flops(), size, forwards


def render(plan: Plan) -> str:
    """The costs in lines of the form `name value`; each process is one GPU."""
    recipe, n, weights = plan.recipe, plan.num_processes, 4 * plan.net.num_parameters()
    flops, activations, forwards = count(plan)
    step = flops * recipe.global_batch // plan.micro_batch
    rate = PEAK_FLOPS[recipe.plan[0]][0 if recipe.mixed_precision == "bf16" else 1 if recipe.tf32 else 2]
    hours = step * plan.total / (MFU * rate) / 3600
    whole, sharded = (sum(memory(recipe, plan.net, shards).values()) for shards in (1, n))
    # A ring sends (n - 1) / n of what it gathers or sums. Guidance's forward has no backward, which gathers again.
    ring, num_gathers = (n - 1) / n, len(forwards) + sum(forwards)
    gathered = weights // 2 if recipe.mixed_precision == "bf16" else weights
    sharded_traffic = ring * (gathered * num_gathers * recipe.accumulation_steps + weights)
    size = checkpoint_bytes(recipe, plan.net)
    lines = {
        "FLOPs": f"{flops / plan.micro_batch:.3e} a sample, {step:.3e} a step, {step * plan.total:.3e} in all",
        "time": f"{hours:,.1f} {recipe.plan[0].upper()}-hours, {hours / n:,.1f} hours on {n}, at {MFU:.0%} MFU",
        "GPU": f"DDP {gib(whole + activations)}, FSDP2 {gib(sharded + activations)}; activations {gib(activations)}",
        "network": f"each GPU sends a step: DDP {gib(2 * ring * weights)}, FSDP2 {gib(sharded_traffic)}",
        "saving": f"{size / DISK:.0f} s a checkpoint at {DISK / 1e9:g} GB/s, beside training",
    }
    return "\n".join(f"  {name:10}{value}" for name, value in lines.items())
