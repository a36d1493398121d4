"""Will DWDP pay? A cost model, a planner and a simulator; pure Python, no GPU needed."""
