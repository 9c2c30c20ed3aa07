#!/usr/bin/env bash
# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
#
# Train and evaluate on the hippocampus set (Medical Segmentation Decathlon task 04), without and with labels.
#
#   benchmarks/hippocampus.sh DATASET_DIR OUTPUT_DIR
#
# prints the tables of the README: without labels, the same refined for every pair, with labels. About fifty minutes on
# two CPU cores.
set -euo pipefail
dataset=${1:?the folder with the dataset.json of task 04}
output=${2:?a folder for the results}
configs="$(dirname "$0")/../bundle/configs"
files="'$configs/train.json', '$configs/data_hippocampus.json'"
for variant in unsupervised supervised; do
    options=(--dataset_dir "$dataset" --output_dir "$output/$variant")
    test "$variant" = unsupervised || options+=(--label_weight 2)
    python -m monai.bundle run training --config_file "[$files]" "${options[@]}"
    python -m monai.bundle run evaluating --config_file "[$files, '$configs/evaluate.json']" "${options[@]}"
done
python -m monai.bundle run evaluating --config_file "[$files, '$configs/evaluate.json']" --dataset_dir "$dataset" \
    --ckpt_path "$output/unsupervised/model.pt" --refine 100 --output_dir "$output/refined"
