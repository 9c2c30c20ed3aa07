#!/usr/bin/env bash
# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
#
# Train the hippocampus model with labels (Medical Segmentation Decathlon task 04), in four stages.
#
#   benchmarks/hippocampus_model.sh DATASET_DIR OUTPUT_DIR
#
# The second stage goes on from the first one with stronger augmentation, the moving image's own affine among it, and a
# heavier label term; the third one, the beginning of a longer training, with a second pass of the network, after which
# fields hardly fold; so the last one regularizes less. About four hours on one CPU core.
set -euo pipefail
dataset=${1:?the folder with the dataset.json of task 04}
output=${2:?a folder for the results}
configs="$(dirname "$0")/../bundle/configs"
files="'$configs/train.json', '$configs/data_hippocampus.json', '$configs/augment.json'"
train() { python -m monai.bundle run training --dataset_dir "$dataset" "$@"; }

train --config_file "[$files]" --label_weight 2 --max_epochs 240 --val_interval 40 --output_dir "$output/first"
tune() {
    train --config_file "[$files, '$configs/finetune.json']" --label_weight 5 --moving_affine_prob 0.8 --rotation 0.2 \
        --scaling 0.15 --intensity_prob 0.4 --learning_rate 0.0007 "$@"
}
tune --init_path "$output/first/model.pt" --max_epochs 100 --val_interval 20 --output_dir "$output/second"
tune --init_path "$output/second/model.pt" --network_def#num_passes 2 --max_epochs 30 --val_interval 30 \
    --lr_scheduler#total_iters 90 --output_dir "$output/third"
tune --init_path "$output/third/model.pt" --regularization_weight 0.2 --max_epochs 54 --val_interval 18 \
    --output_dir "$output/model"
