#!/bin/sh
# Correctness and speed of the engine on one GPU, in under 8 minutes and without network.
#
#     sh benchmarks/gpu.sh [FOLDER]        results go to FOLDER (gpu-results by default), one file a part
#
# Each part has its own time and goes on whatever became of the one before; its lines are in FOLDER/PART.log as they
# come. The last lines say what each part came to; the exit status is that of the first that failed.
cd "$(dirname "$0")/.." || exit 1
folder=${1:-gpu-results}
python=${PYTHON:-python}
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}." PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
mkdir -p "$folder"
status=0

part() { # name, seconds, command …
    name=$1 seconds=$2
    shift 2
    begun=$(date +%s)
    echo "== $name (at most $seconds s)"
    { timeout "$seconds" "$@" 2>&1; echo $? >"$folder/$name.status"; } | tee "$folder/$name.log"
    code=$(cat "$folder/$name.status")
    echo "$name: exit $code after $(($(date +%s) - begun)) s" | tee -a "$folder/summary.txt"
    [ "$status" -ne 0 ] || status=$code
}

: >"$folder/summary.txt"
part machine 20 "$python" -c "import torch; print(torch.__version__, torch.version.cuda); \
print(torch.cuda.get_device_name(), torch.cuda.mem_get_info())"
part kernels 60 "$python" -m pytest -q --noconftest -o addopts= -p no:cacheprovider tests/test_kernels.py \
    tests/test_kernels_draw.py tests/test_kernels_experts.py
part exact 80 "$python" -m benchmarks.gpu --device cuda --out "$folder/exact.json"
part steps 80 "$python" -m benchmarks.gpu_steps
part release 170 "$python" -c "from antiphon.cli import main; main()" bench --random release --device cuda --dtype bfloat16 \
    --capacity 64 -c 1 -c 16 -c 32 -c 64 --turns 4 --max-frames 50 --uploaded --out "$folder/release.json"
part tiny 60 "$python" -c "from antiphon.cli import main; main()" bench tiny --device cuda --dtype float32 --capacity 64 \
    --question examples/question.wav -c 1 -c 16 -c 64 --max-frames 50 --out "$folder/tiny.json"
echo "== summary"
cat "$folder/summary.txt"
exit "$status"
