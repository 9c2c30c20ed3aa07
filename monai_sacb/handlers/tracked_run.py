# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

from ignite.engine import Engine

from monai.handlers import MLFlowHandler

__all__ = ["TrackedRunHandler"]

# tag of a run in MLflow
TAG = "monai_sacb.work"


class TrackedRunHandler(MLFlowHandler):
    """
    MONAI's handler for MLflow, for work that goes on after an interruption.

    Resumed work goes on in the latest run that records it, whatever else of the experiment is unfinished; where that
    has been finished, as when a training is extended, a new run begins. Parameters that a run has already stay as they
    are.

    Args:
        work: what the run records, such as ``"training in <folder>"``: by this tag of the run it is found again.
        resume: whether to look for it.
        **kwargs: arguments of ``monai.handlers.MLFlowHandler``.
    """

    def __init__(self, work: str, resume: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cur_run: Any
        self.work = work
        self.resume = resume

    def start(self, engine: Engine) -> None:
        """Find the run or make it, and record the parameters."""
        self._set_experiment()
        if self.resume and self.cur_run is None:
            runs = self.client.search_runs([self.experiment.experiment_id], order_by=["attributes.start_time DESC"])
            latest = next((run for run in runs if run.data.tags.get(TAG) == self.work), None)
            if latest is not None and latest.info.status != self.run_finish_status:
                self.cur_run = latest
        super().start(engine)
        self.client.set_tag(self.cur_run.info.run_id, TAG, self.work)

    def _log_params(self, params: dict[str, Any]) -> None:
        new = dict(params)
        self._delete_exist_param_in_dict(new)
        super()._log_params(new)
