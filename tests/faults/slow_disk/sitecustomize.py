"""A slow disk: with this folder on PYTHONPATH, each fsync and each renaming takes FASTLT_FAULTS_SLOW_DISK_S seconds."""

import os
import time


def _slowed(function):
    def slow(*arguments, **options):
        time.sleep(float(os.environ.get("FASTLT_FAULTS_SLOW_DISK_S", "0")))
        return function(*arguments, **options)

    return slow


for _name in ("fsync", "replace", "rename"):
    setattr(os, _name, _slowed(getattr(os, _name)))
