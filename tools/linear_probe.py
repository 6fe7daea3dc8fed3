"""Linear probe of frozen features; the same as ``heatssl probe``. Several processes share the extraction.

torchrun --nproc-per-node=8 tools/linear_probe.py run=runs/demo
python tools/linear_probe.py run=runs/demo
"""

import sys

from heatssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["probe", *sys.argv[1:]]))
