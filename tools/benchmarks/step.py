"""The table of a training step's costs, and of how they grow."""

import time
from dataclasses import replace

from .options import Network, Scale, Step
from .ways import Ways, build, count_bytes, count_flops, interleaved, profile_step

# Multiplications and additions in bfloat16 without sparsity, per second, by a part of the GPU's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def step(options: Step) -> list[dict]:
    """The table's rows: counts, seconds, and each as a ratio to flow matching of the same mode."""
    import torch
    from torch._inductor.utils import fresh_cache

    ways = Ways(options, build(options))
    narrow = Ways(replace(options, batch=4, ratio=tuple(snap(ratio) for ratio in options.ratio)), build(options, True))
    modes = ("eager", "compiled") if options.compiled else ("eager",)
    rows, steps, host = {}, {}, {}
    for mode in modes:
        for name, narrow_name in zip(ways.names(), narrow.names()):
            way = ways.make(name, mode == "compiled")
            begin = time.perf_counter()
            with fresh_cache():
                way.step()
            row = {"way": name, "mode": mode, "compile": time.perf_counter() - begin if mode == "compiled" else None}
            row["flops"] = rows[name, "eager"]["flops"] if mode == "compiled" else count_flops(way)
            row["bytes"] = count_bytes(way)
            rows[name, mode] = row | profile_step(way.step, options.device)
            steps[name, mode] = way.step
            host[name, mode] = narrow.make(narrow_name, mode == "compiled").step
    runs = [interleaved(steps, options) for _ in range(options.runs)]
    for way, row in rows.items():
        ratios = [run[way] / run["flow matching", way[1]] for run in runs]
        best = min(range(options.runs), key=ratios.__getitem__)
        row |= {"seconds": runs[best][way], "seconds_ratio": ratios[best], "worst_ratio": max(ratios)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for way, seconds in interleaved(host, options).items():
        rows[way]["host"] = seconds
    torch.set_num_threads(threads)
    for (_, mode), row in rows.items():
        base = rows["flow matching", mode]
        row |= {f"{key}_ratio": row[key] / base[key] for key in ("flops", "bytes", "peak", "host")}
        if options.device.startswith("cuda"):
            row |= utilisation(row)
    return list(rows.values())


def snap(ratio: float) -> float:
    """The next share that 4 samples can have."""
    return max(1, round(4 * ratio)) / 4


def utilisation(row: dict) -> dict:
    """TFLOP/s, and their share of the most that the GPU can do in bfloat16 (MFU), if its name is known."""
    import torch

    rate, name = row["flops"] / row["seconds"], torch.cuda.get_device_name()
    most = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
    return {"gpu": name, "tflops": rate / 1e12, "mfu": rate / most if most else None}


def scale(options: Scale) -> list[dict]:
    """The table's rows: flow matching and this project's step, compiled, by batch, tokens and depth."""
    step_options = {field: getattr(options, field) for field in Network.__dataclass_fields__}
    base = Step(**step_options, batch=options.batch[0], ratio=(options.ratio,), usual=False)
    variations = [("batch", "batch", options.batch), ("tokens", "input_size", options.sizes)]
    variations += [("depth", "depth", options.depths)] * (options.model == "custom")
    rows = []
    for quantity, field, values in variations:
        for value in values:
            changed = replace(base, **{field: value})
            ways = Ways(changed, build(changed))
            seconds = interleaved({name: ways.make(name, compiled=True).step for name in ways.names()}, options)
            shown = (value // options.patch_size) ** 2 if quantity == "tokens" else value
            flow, ours = seconds.values()
            rows.append({"quantity": quantity, "value": shown, "seconds": ours, "ratio": ours / flow})
    return rows


def mib(size: int) -> str:
    return f"{size / 2**20:.0f}"


def print_step(rows: list[dict]) -> None:
    print(
        "\n| step | | GFLOPs | x | MiB kept | x | MiB peak | x | operations | host ms | x | ms | x | to | compile s |"
    )
    print("|:---|:---|" + "---:|" * 13)
    for row in rows:
        memory = " | ".join(f"{mib(row[key])} | {row[f'{key}_ratio']:.3f}" for key in ("bytes", "peak"))
        times = " | ".join(f"{row[key] * 1e3:.3g} | {row[f'{key}_ratio']:.2f}" for key in ("host", "seconds"))
        times += f" | {row['worst_ratio']:.2f}"
        flops = f"{row['flops'] / 1e9:.1f} | {row['flops_ratio']:.3f}"
        compile_seconds = f"{row['compile']:.0f}" if row["compile"] else ""
        cells = (row["way"], row["mode"], flops, memory, row["operations"], times, compile_seconds)
        print("| " + " | ".join(map(str, cells)) + " |")
    if "gpu" in rows[0]:
        print(f"\n{rows[0]['gpu']}")
        for row in rows:
            share = f"{row['mfu']:.1%} MFU" if row["mfu"] else "MFU unknown: this GPU's peak is not in PEAK_FLOPS"
            print(f"{row['way']}, {row['mode']}: {row['tflops']:.1f} TFLOP/s, {share}")


def print_scale(rows: list[dict]) -> None:
    print("\n| | | ms | x flow matching |\n|:---|---:|---:|---:|")
    for row in rows:
        print(f"| {row['quantity']} | {row['value']} | {row['seconds'] * 1e3:.3g} | {row['ratio']:.2f} |")
