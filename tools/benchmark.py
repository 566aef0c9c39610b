"""What training and sampling cost, as ratios within one run of this tool.

    python tools/benchmark.py step
    python tools/benchmark.py step --model UNet-cifar --input-size 32 --channels 3 --batch 4 --ratio 0.75
    python tools/benchmark.py step --model DiT-B/4 --input-size 32 --batch 64 --dtype bf16 --device cuda --json out.json
    python tools/benchmark.py scale
    python tools/benchmark.py improved
    python tools/benchmark.py sample
    python tools/benchmark.py loader
    python tools/benchmark.py data

FLOPs, bytes and operations are exact counts, time is the median of interleaved repeats.
"""

import json

import tyro

from meanflow.program import refusals


def main() -> None:
    from benchmarks.options import Data, Improved, Loader, Sample, Scale, Step

    names = {"step": Step, "scale": Scale, "improved": Improved, "sample": Sample, "loader": Loader, "data": Data}
    options = tyro.extras.subcommand_cli_from_dict(names, description=__doc__)
    from benchmarks.data import data, loader, print_data, print_loader
    from benchmarks.improved import improved, print_improved
    from benchmarks.sample import print_sample, sampling
    from benchmarks.step import print_scale, print_step, scale, step

    commands = {Step: (step, print_step), Scale: (scale, print_scale), Sample: (sampling, print_sample)}
    commands |= {Data: (data, print_data), Loader: (loader, print_loader), Improved: (improved, print_improved)}
    measure, show = commands[type(options)]
    rows = measure(options)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    with refusals():
        main()
