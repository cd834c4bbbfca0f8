#!/bin/bash
# Everything that ships, from the drawings to the figures, on a stage of its own; then, by hand, `tools/stage.py --take`.
#
#     tools/train_all.sh [WORK] [SCALE]
#
# WORK (.cache) keeps every state: the same command goes on where it stopped. SCALE multiplies the minutes, which are for
# two quiet cores: 1 takes about ten hours; where an accelerator makes a minute worth more, less will do.
set -e -o pipefail # the log's pipe must not hide a failure
cd "$(dirname "$0")/.."
work=$(realpath -m "${1:-.cache}") scale=${2:-1}
minutes() { python -c "import sys; print(float(sys.argv[1]) * float(sys.argv[2]))" "$1" "$scale"; }

python tools/stage.py "$work/stage"
export PYTHONPATH=$work/stage
mkdir -p "$work/log" "$work/shipped"
for part in emoji reward-heldout; do # what the new ones begin with
    [ -d "$work/shipped/$part" ] && continue
    rm -rf "$work/shipped/$part.new"
    cp -r "src/palate/assets/$part" "$work/shipped/$part.new"
    mv "$work/shipped/$part.new" "$work/shipped/$part" # whole or absent
done
assets=$work/stage/palate/assets pool=$work/pool vae=$work/autoencoder/polished
judges=(--pool "$pool" --vae "$vae" --work "$work/rewards")
run() { echo "$(date +%H:%M) $*"; python "$@"; }

{
    [ -f "$assets/atlas/vocabulary.json" ] || run tools/build_atlas.py --packages "$work/packages"
    run tools/build_prompts.py
    run tools/pool.py --chunks 40 --pool "$pool"
    run tools/train_autoencoder.py --minutes "$(minutes 90)" --anchor "$work/shipped/emoji/vae" --pool "$pool" \
        --work "$work/autoencoder"
    run tools/polish_decoder.py --minutes "$(minutes 20)" --pool "$pool" --work "$work/autoencoder"
    run tools/train_detector.py --minutes "$(minutes 25)" "${judges[@]}"
    run tools/train_rewards.py judge --minutes "$(minutes 25)" --seed 3 --lr 3e-3 "${judges[@]}"
    run tools/train_rewards.py emoji --minutes "$(minutes 40)" --batch 80 "${judges[@]}"
    run tools/train_rewards.py heldout --minutes "$(minutes 40)" --batch 80 --seed 2 --lr 2e-3 "${judges[@]}" \
        --init "$work/shipped/reward-heldout"
    run tools/train_base.py --minutes "$(minutes 300)" --pool "$pool" --vae "$vae" --init "$work/shipped/emoji" \
        --work "$work/base"
    run tools/base_folder.py "$work/base/model" --out "$assets/emoji"
    # build_negatives.py and train_rewards.py --negatives are left out: as they stand they harm the reward (docs/log.md)
    run tools/train_consistency.py --minutes "$(minutes 12)" --lr 1.5e-3 --batch 16 --work "$work/consistency"
    mkdir -p "$assets/emoji-consistency"
    cp "$work/consistency/README.md" "$work/consistency/pytorch_lora_weights.safetensors" "$assets/emoji-consistency/"
    one=$work/runs/one-step
    if [ ! -d "$one/export/one-step" ]; then
        if [ -d "$one/checkpoints" ]; then run -m palate resume "$one"
        else run -m palate train distar-emoji run.folder="$one" --fresh; fi
        run -m palate export "$one" --format one-step
    fi
    run tools/ship_generator.py "$one/export/one-step" --out "$assets/emoji-1step"
    run tools/evaluate_assets.py --grids "$work/evaluation"
    run tools/model_card.py --assets "$assets"
} 2>&1 | tee -a "$work/log/all.log"
