#!/usr/bin/env bash
# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
#
# Train the hippocampus model that needs no labels of the images (Medical Segmentation Decathlon task 04).
#
#   benchmarks/hippocampus_unlabelled.sh MAPS_DIR DATASET_DIR OUTPUT_DIR
#
# A network that has seen nothing but synthetic images labels the images of the dataset, and SACB-Net is trained and
# chosen by these labels, in four stages, the last two with a second pass of the network: the third one is the beginning
# of a longer training, the next one regularizes more. Then this network lays images on one another, the label that most
# of ten others agree on takes the place of each image's own, and a fifth stage goes on with these. About three and a
# half hours on one CPU core that has bfloat16.
set -euo pipefail
maps=${1:?the folder with the whole-head label maps}
dataset=${2:?the folder with the dataset.json of task 04}
output=${3:?a folder for the results}
here="$(dirname "$0")"
configs="$here/../bundle/configs"
labelled="$output/labelled"
fused="$output/fused"

files="'$configs/train.json', '$configs/data_hippocampus.json'"
train() { python -m monai.bundle run training --config_file "[$files, '$1/labels.json']" --dataset_dir "$@"; }
tune() { files="$files, '$configs/finetune.json'" train "$@"; }

test -f "$labelled/dataset.json" || python "$here/synthetic_segmentation.py" "$maps" "$dataset" "$labelled"
train "$labelled" --label_weight 1 --output_dir "$output/first"
tune "$labelled" --init_path "$output/first/model.pt" --label_weight 1 --learning_rate 0.0008 --max_epochs 50 \
    --output_dir "$output/second"
tune "$labelled" --init_path "$output/second/model.pt" --network_def#num_passes 2 --label_weight 2 \
    --regularization_weight 0.6 --learning_rate 0.0007 --lr_scheduler#total_iters 80 --max_epochs 40 --val_interval 20 \
    --output_dir "$output/third"
tune "$labelled" --init_path "$output/third/model.pt" --label_weight 2 --regularization_weight 1 \
    --learning_rate 0.0005 --max_epochs 22 --val_interval 11 --output_dir "$output/fourth"
test -f "$fused/dataset.json" || python "$here/fuse_labels.py" "$labelled" "$output/fourth/model.pt" "$fused"
tune "$fused" --init_path "$output/fourth/model.pt" --label_weight 2 --regularization_weight 1 --learning_rate 0.0007 \
    --max_epochs 45 --val_interval 15 --output_dir "$output/model"
