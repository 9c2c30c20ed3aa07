# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from monai_sacb.apps.cli import main

if __name__ == "__main__":
    main()
