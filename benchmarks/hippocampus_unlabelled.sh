#!/usr/bin/env bash
# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
#
# Train the hippocampus model that needs no labels of the images (Medical Segmentation Decathlon task 04).
#
#   benchmarks/hippocampus_unlabelled.sh MAPS_DIR DATASET_DIR OUTPUT_DIR
#
# A network that has seen nothing but synthetic images labels the images of the dataset, and SACB-Net is trained and
# chosen by these labels. About an hour on one CPU core that has bfloat16.
set -euo pipefail
maps=${1:?the folder with the whole-head label maps}
dataset=${2:?the folder with the dataset.json of task 04}
output=${3:?a folder for the results}
here="$(dirname "$0")"
configs="$here/../bundle/configs"
labelled="$output/labelled"

test -f "$labelled/dataset.json" || python "$here/synthetic_segmentation.py" "$maps" "$dataset" "$labelled"
python -m monai.bundle run training \
    --config_file "['$configs/train.json', '$configs/data_hippocampus.json', '$labelled/labels.json']" \
    --dataset_dir "$labelled" --label_weight 1 --output_dir "$output/model"
