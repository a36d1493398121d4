"""`sglang-dwdp doctor`: whether this machine can serve with DWDP; facts (probes.py) apart from what they mean."""
