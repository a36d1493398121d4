"""Examples of the property tests may take long on a machine that does other work: only their outcome counts."""

from hypothesis import settings

settings.register_profile("planner", deadline=None)
settings.load_profile("planner")
