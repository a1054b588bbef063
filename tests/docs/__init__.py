"""The README and docs/ are true: what they show works, and what there is, they tell of."""
