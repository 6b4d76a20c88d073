"""Convolutions of the packed layout by other packages: spconv and Triton."""
