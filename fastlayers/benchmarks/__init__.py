"""The benchmarks: declarations (what is compared, on what, which ratio is wanted) and the one runner that times them.

They lie inside the package so that `fastlayers bench` works wherever fastlayers is installed; `benchmarks/` at the
top of the source tree is a link to this folder.
"""
