"""Pretrain, startable by torchrun and SLURM; the same as ``heatssl pretrain``.

torchrun --nproc-per-node=8 tools/pretrain.py recipe=imagenet_vit_small data.root=/path/to/imagenet
srun --ntasks-per-node=8 python tools/pretrain.py recipe=imagenet_vit_small trainer.nodes=2 data.root=...
"""

import sys

from heatssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
