"""A family from outside the package, as a user would write one: LTX-Video under another name."""

from finetrainers.families.ltx import LTXVideo


class OwnVideo(LTXVideo):
    name = "own"
    pipelines = ("OwnPipeline",)


class NoFamily:
    """Something else."""
