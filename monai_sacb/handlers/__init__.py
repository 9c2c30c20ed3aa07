# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .checkpoint import BestModelSaver, LoadWeights, TrainingCheckpoint
from .cluster_maps import ClusterMaps
from .last_epoch_validation import LastEpochValidation
from .loss_terms import LossTerms
from .loss_weight_schedule import LossWeightSchedule
from .pair_journal import PairJournal
from .pair_metric import PairMetric
from .pair_saver import PairSaver
from .process_mean import ProcessMeanLoss
from .registration_figure import RegistrationFigure
from .registration_images import RegistrationImages
from .registration_table import RegistrationTable
from .resources import PairResources
from .stop_on_divergence import StopOnDivergence
from .tracked_run import TrackedRunHandler

__all__ = [
    "BestModelSaver",
    "ClusterMaps",
    "LastEpochValidation",
    "LoadWeights",
    "LossTerms",
    "LossWeightSchedule",
    "PairJournal",
    "PairMetric",
    "PairResources",
    "PairSaver",
    "ProcessMeanLoss",
    "RegistrationFigure",
    "RegistrationImages",
    "RegistrationTable",
    "StopOnDivergence",
    "TrackedRunHandler",
    "TrainingCheckpoint",
]
