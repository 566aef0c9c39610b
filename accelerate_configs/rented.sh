#!/usr/bin/env bash
# Runs a recipe on a rented machine, for Hugging Face Jobs and SkyPilot:  rented.sh RECIPE --out FOLDER [flags]
# The machine's service starts a job again whose exit code is not 0. After a divergence (3) or a refusal (2) that would be in
# vain, so these end with 0, and say so.
cd "$(dirname "$0")/.."
[ -w . ] || { cp -r . /tmp/meanflow && cd /tmp/meanflow; }  # a mount may be read-only
pip install -q -c constraints.txt -e . || exit 1
gpus=$(nvidia-smi --list-gpus | wc -l)
[ "$gpus" -gt 1 ] && config=accelerate_configs/multi_gpu.yaml || config=accelerate_configs/single_gpu.yaml
python tools/launch.py "$@" --config-file "$config" --num-processes "$gpus" --retries 5 &
launcher=$!
trap 'kill -TERM $launcher' TERM INT  # the run then saves and leaves
wait $launcher
code=$?
while kill -0 $launcher 2> /dev/null; do wait $launcher; code=$?; done  # a signal ends a wait early
case $code in
    2 | 3) echo "ended with code $code: something has to be changed first" ;;
    *) exit $code ;;
esac
