"""Compiling the objective, so that Python costs nothing in a step and operations are fused."""

import sys

import torch
from torch._inductor.cpp_builder import get_cpp_compiler


def compile_objective(objective, backend: str = "inductor", **options) -> None:
    """From now on objective(batch, step) is one graph of torch.compile; the first call compiles it.

    A value that it reads, such as step, is part of the graph: another one compiles another graph, and 8 are allowed.
    Blocks whose forward is a torch.compiler.nested_compile_region are compiled once for all of them.

    Args:
        objective: an Objective.
        options: of inductor.
    Raises:
        TorchDynamoException: at the first call, where the objective or its network cannot be compiled.
    """
    if any(hasattr(type(module).forward, "__marked_compile_region_fn__") for module in objective.modules()):
        # A region returns some of its inputs, for the backward. Inductor would write into these, and it would keep
        # activations in another memory format than the region's backward expects (seen with torch 2.15).
        options |= {"allow_buffer_reuse": False, "layout_optimization": False}
    torch._dynamo.config.optimize_ddp = False  # which would cut the graph at DDP's buckets, and cannot cut it here
    options = options if backend == "inductor" else None
    objective.compile(backend=backend, fullgraph=True, dynamic=False, options=options)


def can_compile(accelerator) -> bool:
    """Whether inductor works here; if not, a line says why.

    Raises:
        ValueError: the weights are to be sharded.
    """
    if accelerator.is_fsdp2:
        raise ValueError("compile: FSDP2's hooks cannot be part of a compiled graph: leave it out, --no-compile")
    try:
        get_cpp_compiler()
    except RuntimeError as error:
        accelerator.print(f"warning: the step is not compiled, --no-compile silences this: {error}", file=sys.stderr)
        return False
    accelerator.print("the first step is compiled, which takes minutes", file=sys.stderr)
    return True
