"""The one error that the planner raises for bad input."""


class PlannerError(ValueError):
    """Bad input: the message says what is wrong and what to do about it."""
