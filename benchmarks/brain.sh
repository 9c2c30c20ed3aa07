#!/usr/bin/env bash
# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
#
# Train the brain model on synthetic images only, from whole-head label maps.
#
#   benchmarks/brain.sh MAPS_DIR OUTPUT_DIR
#
# The first stage learns at 4 mm what is the same in all contrasts, in a third of the time a step; the others learn the
# detail at 2 mm, first on parts of the volumes, then on the whole. A good hour on one CPU core that has bfloat16.
set -euo pipefail
maps=${1:?the folder with the label maps}
output=${2:?a folder for the results}
here="$(dirname "$0")"
configs="$here/../bundle/configs"
files="'$configs/train.json', '$configs/brain.json'"
data="$output/data"
test -f "$data/dataset.json" || python "$here/head_label_maps.py" "$maps" "$data"
train() { python -m monai.bundle run training --dataset_dir "$data" --amp true --pairs_per_epoch 60 "$@"; }

train --config_file "[$files]" --rotation 0.07 --scaling 0.06 --regularization_weight 1.0 \
    --contrast_weights "[0.3, 0.2, 0.5]" --lr_scheduler#total_iters 24 --val_interval 8 --output_dir "$output/coarse" \
    --spatial_size "[48, 48, 48]" --crop_size "[48, 48, 48]" --working_voxel_size 4.0 --max_epochs 18

fine=(--config_file "[$files, '$configs/finetune.json']" --learning_rate 0.0008 --lr_scheduler#total_iters 36
    --init_path "$output/coarse/checkpoint.pt" --output_dir "$output/brain")
train "${fine[@]}" --crop_size "[64, 80, 64]" --max_epochs 26
train "${fine[@]}" --max_epochs 32 --resume true
