"""The errors of a comparison."""


class ScenarioError(ValueError):
    """The scenario file, or what it names, cannot work. Raised before anything is started."""


class RunError(RuntimeError):
    """One server, or one run of the benchmark against it, failed; the comparison goes on with the others."""
