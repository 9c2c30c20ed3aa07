#!/usr/bin/env bash
# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
#
# The brain model on OASIS-TRT-20, which it has not been trained on: the bundle's evaluation, without and with refinement,
# and other tools on the first pairs, with the moving image as it is, inverted and of another gamma.
#
#   benchmarks/oasis.sh ALIGNED_2MM OUTPUT_DIR
#
# ALIGNED_2MM has images/ and labels/ of one name each, labels renumbered as data_oasis.json says. Each subject is laid
# on the next, the last on the first. SUBJECTS, LIMIT, METHODS and CONTRASTS in the environment change how much is done.
# With FILES=true, as for images of 1 mm, the model is not given the arrays, which it is not for, but register the files.
set -euo pipefail
data=$(realpath "${1:?the folder with images and labels}")
output=${2:?a folder for the results}
here="$(dirname "$0")"
configs="$here/../bundle/configs" model="$here/../bundle/models/model.pt"
read -ra methods <<< "${METHODS:-identity synpreset syn greedy convexadam}"
mkdir -p "$output/data"
python - "$data" "$output/data/dataset.json" "${SUBJECTS:-14}" <<'PYTHON'
import json
import pathlib
import sys

data, target, number = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
names = sorted(path.name for path in (data / "images").iterdir())[:number]
subjects = [{kind: str(data / f"{kind}s" / name) for kind in ("image", "label")} for name in names]
pairs = [
    {"moving": moving["image"], "fixed": fixed["image"]} for moving, fixed in zip(subjects, subjects[1:] + subjects[:1])
]
target.write_text(json.dumps({"training": [], "validation": subjects, "registration_val": pairs}))
PYTHON
network=(--weights "brain=$model,$configs/brain.json" --refine 100) steps="0 100"
if test "${FILES:-false}" = true; then
    network=() steps="" methods+=(application_brain)
fi
for steps in $steps; do
    python -m monai.bundle run evaluating --dataset_dir "$output/data" --output_dir "$output/refined_$steps" \
        --config_file "['$configs/train.json', '$configs/data_oasis.json', '$configs/evaluate.json']" \
        --renumbered true --network_def#self_similarity True --ckpt_path "$model" --refine "$steps" --saved_pairs 0
done
for contrast in ${CONTRASTS:-same inverted gamma}; do
    python "$here/peers.py" --dataset oasis --set renumbered=true --dataset_dir "$output/data" --threads 1 \
        --output_dir "$output/$contrast" --contrast "$contrast" --limit "${LIMIT:-5}" --methods "${methods[@]}" \
        "${network[@]}"
done
