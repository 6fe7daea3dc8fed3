"""Attribution heatmaps; the same as ``heatssl attribute``. One process is enough.

torchrun --nproc-per-node=1 tools/attribute.py run=runs/demo
python tools/attribute.py run=runs/demo target=self
"""

import sys

from heatssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["attribute", *sys.argv[1:]]))
