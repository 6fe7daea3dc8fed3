"""heatssl: self-supervised vision pretraining whose feature maps obey the heat equation.

Light on purpose: importing the package imports no torch, so that ``heatssl --help`` answers at once.
The parts are ``heatssl.heat``, ``.backbones``, ``.objectives``, ``.evaluation`` and ``.attribution``.
"""

__version__ = "0.1.0"
