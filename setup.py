"""Build script. The package is pure Python: every op runs on the plain torch implementation beside it in `smartmoe.ops`."""

from setuptools import setup

setup()
