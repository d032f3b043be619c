"""The tests of hosts run on CPUs, also where there are GPUs, which DeepSpeed would take."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
