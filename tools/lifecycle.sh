#!/usr/bin/env bash
# All training stages on real text: pretraining, fine-tuning on questions, a reward model, PPO and GRPO on word problems
# with verifiable answers, and a page that compares them.
# The same command resumes.  Arguments are overrides of every training config, such as --config.train.steps=20.
#   WORKDIR  folder for runs, data and the page (runs/lifecycle)
#   BASE     run of configs/pretrain/quickstart.py to use as the base model, instead of training one
#   DATA     folder with your own chat.jsonl, pairs.jsonl and ask.jsonl (prompts for all stages); default: questions from
#            the docstrings of this Python
#   LIMIT    number of sequences of each data set to evaluate every stage on (360)
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
install_llmjax .
work=${WORKDIR:-runs/lifecycle}
base=${BASE:-$work/base}
questions=${DATA:-$work/text/questions}

show() { printf '\n$ %s\n' "$*"; "$@"; }
prepare() {  # FILE NAME KIND
  show llmjax prepare --config=configs/data/chat.py --config.path="$1" --config.records="$3" \
    --config.output="$work/data/$2" --config.tokenizer.path=data/python_docs/tokenizer.model \
    --config.validation_fraction=0.15 --config.test_fraction=0
}
train() {  # COMMAND STAGE PARENT SOURCES [OVERRIDE ...]
  local command=$1 stage=$2 parent=$3 sources=$4
  show llmjax "$command" --config="configs/lifecycle/$stage.py" --workdir="$work/$stage" \
    --config.train.init_from="$parent" --config.data.sources="$sources" "${@:5}"
}

show llmjax prepare --config=configs/data/python_docs.py
[ -n "${DATA:-}" ] || [ -e "$questions/ask.jsonl" ] || show python experiments/lifecycle/make_questions.py "$questions"
[ -e "$work/text/problems/ask.jsonl" ] || show python experiments/lifecycle/make_problems.py "$work/text/problems"
prepare "$questions/chat.jsonl" questions chat
prepare "$work/text/problems/chat.jsonl" worked chat
prepare "$work/text/problems/prompts.jsonl" problems prompts
cat "$questions/ask.jsonl" "$work/text/problems/ask.jsonl" > "$work/ask.jsonl"

[ -n "${BASE:-}" ] || show llmjax pretrain --config=configs/pretrain/quickstart.py --workdir="$base" \
  --config.train.steps=600 "$@"
train finetune sft "$base" "{'$work/data/questions': 0.55, '$work/data/worked': 0.225, 'data/python_docs': 0.225}" "$@"
if [ ! -e "$questions/pairs.jsonl" ]; then
  show llmjax generate --workdir="$work/sft" --prompts="$questions/rest.jsonl" --chat --temperature=1 --max-new-tokens=48
  show python experiments/lifecycle/make_pairs.py "$work/sft/answers.jsonl" "$questions/pairs.jsonl"
fi
prepare "$questions/pairs.jsonl" pairs preference
train reward reward "$work/sft" "$work/data/pairs" "$@"
train rl ppo "$work/sft" "$work/data/problems" "$@"
train rl grpo "$work/sft" "$work/data/problems" "$@"

# Evaluate all stages on the same data and prompts, except for the reward model, which was evaluated in training.
for run in "$base" "$work/sft" "$work/ppo" "$work/grpo"; do
  show llmjax evaluate --workdir="$run" --seq-len=256 --limit="${LIMIT:-360}" --max-new-tokens=16 \
    --sources="data/python_docs,$work/data/questions,$work/data/worked,$work/data/problems"
  chat=$([ ! -e "$run/chat_template.json" ] || echo --chat)
  show llmjax generate --workdir="$run" --prompts="$work/ask.jsonl" --temperature=0 --max-new-tokens=40 ${chat:+"$chat"}
done
show llmjax report --workdir="$base" --compare="$work/sft,$work/reward,$work/ppo,$work/grpo" \
  --output="$work/report.html"
printf '\nopen %s/report.html\n' "$work"
