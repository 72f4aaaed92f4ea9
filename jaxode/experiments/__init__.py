"""Experiments of the papers, one file each; `jaxode --help` lists them."""
