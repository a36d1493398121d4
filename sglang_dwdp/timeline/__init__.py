"""A picture of a profile: compute and copy streams, and where compute waited for copies."""
