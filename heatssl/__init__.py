"""heatssl: self-supervised vision pretraining with heat in the place of a large decoder.

Light on purpose: importing the package imports no torch, so that ``heatssl --help`` answers at once. Its models join
those of ``timm.create_model`` when timm is imported, whether that was before or comes after.
The parts are ``heatssl.heat``, ``.backbones``, ``.objectives``, ``.evaluation`` and ``.attribution``.
"""

from heatssl.register import register_with_timm

__version__ = "0.1.0"

register_with_timm()
