"""Every method's jaxtyping annotations are checked at run time while the tests run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the suite never leaves the machine
os.environ.setdefault("MPLBACKEND", "Agg")
# Small tensors on few cores: threads would only wait for one another, and far longer beside other work. Before torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

CHECKED = ["nn", "data", "evaluation", "generative", "geometry", "interpretability", "recordings", "diagrams"]
install_import_hook([f"broadsheet.{name}" for name in CHECKED], "beartype.beartype")
