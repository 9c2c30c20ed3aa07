#!/usr/bin/env bash
# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
#
# Train the brain model on synthetic images only, from whole-head label maps.
#
#   benchmarks/brain.sh MAPS_DIR OUTPUT_DIR
#
# The first two stages learn at 4 mm what is the same in all contrasts, in half the time a step (with a short start
# at 2 mm, as the model was trained); the other two learn the detail at 2 mm, first on parts of the volumes. About two
# and a half hours on one CPU core.
set -euo pipefail
maps=${1:?the folder with the label maps}
output=${2:?a folder for the results}
here="$(dirname "$0")"
configs="$here/../bundle/configs"
files="'$configs/train.json', '$configs/brain.json'"
data="$output/data"
test -f "$data/dataset.json" || python "$here/head_label_maps.py" "$maps" "$data"
train() { python -m monai.bundle run training --dataset_dir "$data" "$@"; }

wide=(--rotation 0.07 --scaling 0.06 --regularization_weight 1.0 --contrast_weights "[0.3, 0.2, 0.5]"
    --lr_scheduler#total_iters 48 --val_interval 100 --output_dir "$output/coarse")
train --config_file "[$files]" "${wide[@]}" --crop_size "[64, 80, 64]" --amplitude 1.5 --translation 2.0 --max_epochs 5
train --config_file "[$files]" "${wide[@]}" --spatial_size "[48, 48, 48]" --crop_size "[48, 48, 48]" \
    --working_voxel_size 4.0 --max_epochs 36 --resume true

fine=(--config_file "[$files, '$configs/finetune.json']" --learning_rate 0.0008 --lr_scheduler#total_iters 40
    --init_path "$output/coarse/checkpoint.pt" --output_dir "$output/brain")
train "${fine[@]}" --crop_size "[64, 80, 64]" --max_epochs 28
train "${fine[@]}" --max_epochs 40 --resume true
